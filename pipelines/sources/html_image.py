"""Which address of an `img` is its picture: the largest that `srcset` and the `source`s of its `picture` offer, then
what lazy loading hides in `data-…` attributes, then `src`, which is often a grey pixel.

Of `srcset` a width outweighs a density. Kinds that can't be decoded here (AVIF, SVG) are passed over. `media` is not
asked: whichever crop it chooses, the texts are about it.
"""

import re
from collections.abc import Iterator

from lxml import html

ADDRESS_CHARS = 8_000  # a longer address is none
SET_CHARS = 40_000
SETS = ("data-srcset", "data-lazy-srcset", "srcset")
LAZY = ("data-src", "data-original", "data-lazy-src", "data-lazy", "data-original-src", "data-hi-res-src")
DECODED = frozenset({"", "image/jpeg", "image/jpg", "image/pjpeg", "image/png", "image/webp", "image/gif", "image/bmp"})
SIZE = re.compile(r"(\d{1,9}(?:\.\d{0,9})?)([wx])")
Best = tuple[tuple[int, float], str]


def best_address(image: html.HtmlElement, of_picture: Best | None) -> str:
    """The address of an `img`, as it stands there; empty where it has none."""
    best = best_of(image)
    if of_picture and (best is None or of_picture[0] > best[0]):
        best = of_picture
    if best:
        return best[1]
    named = [(image.get(name) or "").strip() for name in (*LAZY, "src")]
    return next((name for name in named if name and not _inline(name)), named[-1])


def best_of(element: html.HtmlElement) -> Best | None:
    """The largest address of the element's sets and its size: (1, width) or (0, density). Of equals the first."""
    if (element.get("type") or "").partition(";")[0].strip().lower() not in DECODED:
        return None
    offers = (offer for name in SETS if (value := element.get(name)) for offer in _offers(value))
    return max(offers, key=lambda offer: offer[0], default=None)


def _offers(srcset: str) -> Iterator[Best]:
    for address, words in _split(srcset[:SET_CHARS]):
        size = SIZE.fullmatch(words.split()[0]) if words.strip() else None
        if not _inline(address):
            yield ((int(size[2] == "w"), float(size[1])) if size else (0, 1.0)), address


def _split(srcset: str) -> Iterator[tuple[str, str]]:
    """Addresses and their descriptors. A comma ends an address only at its end, since addresses may hold some."""
    address, words = "", ""
    for token in srcset.split():
        if address:
            head, comma, token = token.partition(",")
            words = f"{words} {head}"
            if not comma:
                continue
            yield address, words
            address, words = "", ""
        token = token.lstrip(",")
        if token.endswith(","):
            yield token.rstrip(","), ""
        else:
            address = token
    if address:
        yield address, words


def _inline(address: str) -> bool:
    return address[:5].lower() == "data:"
