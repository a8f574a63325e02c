"""The scenes' words in five other languages, with the agreement that a language identifier expects.

A language is written as a few lines of words. Nouns carry their gender (m, f or n); a word with several forms lists
them in the order of the language's genders, separated by slashes. The templates keep every name in the nominative.
"""

from dataclasses import dataclass

from pipelines.demo.scenes import COLOURS, KINDS, SIZES

Forms = dict[str, str]  # gender -> word


@dataclass(frozen=True)
class Language:
    """Words by the English one, and three templates: one thing, two side by side, two one over the other."""

    articles: Forms
    kinds: dict[str, tuple[str, str]]  # noun, gender
    colours: dict[str, Forms]
    sizes: dict[str, Forms]
    order: str
    one: str
    beside: str
    stacked: str


def _forms(genders: str, word: str) -> Forms:
    forms = word.split("/")
    return dict(zip(genders, forms * len(genders) if len(forms) == 1 else forms, strict=False))


def _language(
    articles: str, kinds: str, colours: str, sizes: str, order: str, templates: tuple[str, str, str]
) -> Language:
    genders = "mfn" if articles.count("/") == 2 else "mf"
    nouns = [(noun, gender) for noun, gender in (word.split(":") for word in kinds.split())]
    return Language(
        _forms(genders, articles),
        dict(zip(KINDS, nouns, strict=True)),
        {name: _forms(genders, word) for name, word in zip(COLOURS, colours.split(), strict=True)},
        {name: _forms(genders, word) for name, word in zip(SIZES, sizes.split(), strict=True)},
        order,
        *templates,
    )


def _german(stems: str) -> str:
    return " ".join(f"{stem}er/{stem}e/{stem}es" for stem in stems.split())


def _dutch(words: str) -> str:
    return " ".join(f"{word}e/{word}e/{word}" for word in words.split())


# The order of the words is that of KINDS, COLOURS and SIZES:
# house tree fish boat car flower cup star umbrella key; red orange yellow green blue purple pink black; large small.
LANGUAGES: dict[str, Language] = {
    "de": _language(
        "ein/eine/ein",
        "Haus:n Baum:m Fisch:m Boot:n Auto:n Blume:f Tasse:f Stern:m Regenschirm:m Schlüssel:m",
        _german("rot orangefarben gelb grün blau violett rosafarben schwarz"),
        _german("groß klein"),
        "{article} {size} {colour} {noun}",
        ("auf diesem Bild ist {} zu sehen", "links ist {} und rechts {}", "oben ist {} und darunter {}"),
    ),
    "fr": _language(
        "un/une",
        "maison:f arbre:m poisson:m bateau:m voiture:f fleur:f tasse:f étoile:f parapluie:m clé:f",
        "rouge orange jaune vert/verte bleu/bleue violet/violette rose noir/noire",
        "grand/grande petit/petite",
        "{article} {size} {noun} {colour}",
        ("sur cette image on voit {}", "à gauche il y a {} et à droite {}", "en haut il y a {} et en bas {}"),
    ),
    "es": _language(
        "un/una",
        "casa:f árbol:m pez:m barco:m coche:m flor:f taza:f estrella:f paraguas:m llave:f",
        "rojo/roja naranja amarillo/amarilla verde azul morado/morada rosa negro/negra",
        "grande pequeño/pequeña",
        "{article} {noun} {colour} {size}",
        ("en esta imagen se puede ver {}", "a la izquierda hay {} y a la derecha {}", "arriba hay {} y debajo {}"),
    ),
    "it": _language(
        "un/una",
        "casa:f albero:m pesce:m battello:m macchina:f fiore:m tazza:f stella:f ombrello:m chiave:f",
        "rosso/rossa arancione giallo/gialla verde blu viola rosa nero/nera",
        "grande piccolo/piccola",
        "{article} {size} {noun} {colour}",
        ("in questa immagine si vede {}", "a sinistra c'è {} e a destra {}", "in alto c'è {} e in basso {}"),
    ),
    "nl": _language(
        "een/een/een",
        "huis:n boom:m vis:m boot:m auto:m bloem:f kop:m ster:f paraplu:m sleutel:m",
        f"rode/rode/rood oranje gele/gele/geel {_dutch('groen blauw paars')} roze {_dutch('zwart')}",
        "grote/grote/groot kleine/kleine/klein",
        "{article} {size} {colour} {noun}",
        ("op deze afbeelding is {} te zien", "links staat {} en rechts {}", "boven staat {} en daaronder {}"),
    ),
}
