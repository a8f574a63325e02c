"""What a character is, and which phrases say nothing of an image they stand beside: the tables of `text_stats`.

The phrases are what templates, players and shops put into alt texts, in eleven languages; a phrase counts wherever it
stands, so that "logo" alone is all boilerplate and "an image of a dog" a fifth of it.
"""

import re
import unicodedata

SPECIAL = "S"
WORD = re.compile(r"\w+")
PHRASES: tuple[tuple[str, ...], ...] = (
    (
        "image", "picture", "logo", "icon", "banner", "avatar", "untitled", "placeholder", "spacer", "screenshot",
        "click here", "read more", "learn more", "show more", "see more", "stock photo", "stock image", "stock vector",
        "royalty free", "image not found", "no image", "image may contain", "accept cookies", "cookie policy",
        "privacy policy", "terms of use", "all rights reserved", "copyright", "sign up", "log in", "add to cart",
        "free shipping", "buy now", "subscribe", "follow us", "pinterest", "instagram", "facebook", "twitter",
        "profile photo", "featured image", "main navigation", "skip to content", "powered by", "play video",
    ),
    ("bild", "symbolbild", "vorschaubild", "ohne titel", "hier klicken", "mehr erfahren", "weiterlesen", "werbung",
     "datenschutz", "impressum", "in den warenkorb", "alle rechte vorbehalten", "titelbild", "startseite"),
    ("photo de profil", "cliquez ici", "lire la suite", "en savoir plus", "sans titre", "ajouter au panier",
     "tous droits réservés", "accueil", "vignette", "bannière", "image non disponible"),
    ("imagen", "sin título", "haga clic aquí", "haz clic aquí", "leer más", "ver más", "saber más", "inicio",
     "añadir al carrito", "todos los derechos reservados", "foto de perfil", "política de cookies"),
    ("immagine", "senza titolo", "clicca qui", "leggi tutto", "scopri di più", "aggiungi al carrello",
     "tutti i diritti riservati", "anteprima"),
    ("imagem", "sem título", "clique aqui", "leia mais", "saiba mais", "adicionar ao carrinho",
     "todos os direitos reservados", "foto do perfil"),
    ("afbeelding", "klik hier", "lees meer", "zonder titel", "in winkelwagen", "alle rechten voorbehouden"),
    ("obraz", "zdjęcie", "kliknij tutaj", "czytaj więcej", "bez tytułu", "dodaj do koszyka"),
    ("изображение", "картинка", "нажмите здесь", "подробнее", "читать далее", "без названия", "логотип", "фото"),
    ("画像", "写真", "ロゴ", "続きを読む", "詳細を見る", "アイコン", "サムネイル", "バナー"),
    ("图片", "图像", "标志", "点击这里", "阅读更多", "查看更多", "无标题", "圖片", "缩略图", "封面"),
)  # fmt: skip


class _Classes(dict[int, str]):
    """A table for `str.translate`, filled as characters are met: U upper case, L other letters, D digits,
    N other numbers, M accents, S the rest. Characters beyond the first 65,536 aren't kept, so that it stays small."""

    def __missing__(self, code: int) -> str:
        found = _class(chr(code))
        if code < 1 << 16:
            self[code] = found
        return found


def _class(char: str) -> str:
    if not char.isalnum():
        return "M" if unicodedata.category(char)[0] == "M" else SPECIAL
    if char.isalpha():
        return "U" if char.isupper() else "L"
    return "D" if char.isdigit() else "N"


def _by_first_word() -> dict[str, list[tuple[str, ...]]]:
    """Phrases as words, those that begin alike together, the longest first."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for phrase in (phrase for language in PHRASES for phrase in language):
        words = tuple(WORD.findall(phrase))
        found.setdefault(words[0], []).append(words)
    return {first: sorted(phrases, key=len, reverse=True) for first, phrases in found.items()}


CLASSES = _Classes()
FIRST = _by_first_word()


def boilerplate_fraction(text: str) -> float:
    """Words of `text` that belong to a phrase, over all its words: 2/3 for "click here, Anna"; 0 without words."""
    words = WORD.findall(text.lower())
    if FIRST.keys().isdisjoint(words):
        return 0.0
    covered = place = 0
    while place < len(words):
        length = next((len(p) for p in FIRST.get(words[place], ()) if tuple(words[place : place + len(p)]) == p), 0)
        covered += length
        place += length or 1
    return covered / len(words)
