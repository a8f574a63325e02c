"""Texts that canaries are given in place of their own: what pages say of any picture, and sentences of other languages.

Written for the canaries alone, in words that no filter knows of: a list that a filter shared would measure its memory.
"""

BOILERPLATE = (
    "Tap the picture for a closer look",
    "Image 3 of 12",
    "Add to basket",
    "Caption missing",
    "Follow us for more",
    "All rights reserved, reproduction prohibited",
    "JavaScript is required here",
    "One moment, still opening",
    "Sponsored content",
    "Skip to main content",
    "Sign in to see prices",
    "Previous item | Next item",
    "Photo credit unknown",
    "Free shipping on orders over 50",
    "Read more",
    "Unsupported element",
)

SENTENCES = (  # language, sentence
    ("de", "Am Wochenende bleibt das Museum wegen Umbauarbeiten geschlossen."),
    ("de", "Zwei Wanderer rasten auf einer Bank oberhalb des Dorfes."),
    ("de", "Der Bäcker legt frische Brötchen in das Schaufenster."),
    ("fr", "Le marchand range ses légumes avant l'ouverture du marché."),
    ("fr", "Deux enfants jouent aux cartes sur la terrasse du café."),
    ("fr", "La vieille gare accueille désormais une bibliothèque."),
    ("es", "La vecina riega las plantas del balcón cada mañana."),
    ("es", "Un músico toca la guitarra en la plaza del pueblo."),
    ("es", "Los obreros arreglan el puente después de la tormenta."),
    ("it", "Il cuoco prepara la pasta fresca nella cucina del ristorante."),
    ("it", "Una signora legge il giornale seduta alla stazione."),
    ("it", "Gli operai dipingono la facciata del vecchio teatro."),
    ("pt", "O pescador conserta as redes junto ao cais da vila."),
    ("pt", "Uma menina desenha na areia enquanto espera a avó."),
    ("pt", "O padeiro abre a loja antes do nascer do sol."),
    ("nl", "De timmerman schaaft een plank in zijn kleine werkplaats."),
    ("nl", "Op zaterdag verkoopt de boer kaas op het plein."),
    ("nl", "Twee vrienden fietsen langs de dijk naar het strand."),
    ("ru", "Дедушка чинит старый велосипед во дворе."),
    ("ru", "На площади торгуют мёдом и вязаными шапками."),
    ("ru", "Рабочие красят забор возле школы."),
    ("zh", "老人在公园里慢慢地打太极拳。"),
    ("zh", "厨师正在准备今天的晚餐。"),
    ("zh", "孩子们放学以后一起踢足球。"),
    ("ja", "駅前の小さな店でパンを焼いています。"),
    ("ja", "祖母は縁側で静かに本を読んでいる。"),
    ("ja", "雨の日には古い映画館が混み合う。"),
)
