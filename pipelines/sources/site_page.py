"""What a page says: its images with the texts around them, its links, and what it forbids.

Texts of an image are its `alt`, the caption of the innermost figure around it that has one, its own `title` attribute
and the page's title. One walk from the top carries language, figure and caption, so that a page costs no more than
its size however it nests; what lies beyond the limits below is counted in `cut`, never silently left.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from lxml import etree, html
from scrapy.http import HtmlResponse

from pipelines.fetch.robots import OPT_OUT, agent_token, directives
from pipelines.sources import text

RAW_CHARS = 20_000
ADDRESS_CHARS = 8_000  # a longer address is none
MAX_ELEMENTS = 300_000
MAX_DEPTH = 2_040  # the parser itself ends at 2048, and drops what lies deeper
MAX_IMAGES = 2_000
MAX_LINKS = 20_000
LANG = ("lang", "{http://www.w3.org/XML/1998/namespace}lang")
NO_FOLLOW = frozenset({"nofollow", "none"})


@dataclass
class Figure:
    """A figure; without a caption of its own that of the figure around it holds."""

    around: "Figure | None"
    words: list[str] = field(default_factory=list)
    caption: str = ""


@dataclass
class Found:
    """What the walk gathers. `visited` elements were looked at, `cut` ones were not."""

    title: list[str] | None = None
    base: str = ""
    language: str | None = None  # of the page
    robots: list[str] = field(default_factory=list)
    images: list[tuple[html.HtmlElement, str | None, Figure | None]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)  # outer ones first
    visited: int = 0
    cut: int = 0


def read_page(response: HtmlResponse, agent: str) -> dict[str, Any]:
    """A page's record: `images` (url, texts, found, license), `links` as found (without fragment), `opt_out`, and
    `cut`, the number of elements beyond the limits."""
    found = walk(response.selector.root, agent)
    base = _join(response.url, found.base) or response.url
    header = [value.decode("latin-1") for value in response.headers.getlist("X-Robots-Tag")]
    words = directives([*header, *found.robots], agent)
    title = text(_clip("".join(found.title or [])), "title", found.language)
    for figure in found.figures:
        figure.caption = _clip(" ".join(figure.words)) or (figure.around.caption if figure.around else "")
    images = [_image(*image, base, title) for image in found.images]
    return {
        "images": [image for image in images if image],
        "links": [] if words & NO_FOLLOW else sorted(set(_links(found.links, base))),
        "opt_out": min(words & OPT_OUT, default=None),
        "cut": found.cut,
    }


def walk(root: html.HtmlElement, agent: str) -> Found:
    """Visits each element once, from the top."""
    found, names = Found(language=_language(root, None)), ("robots", agent_token(agent))
    languages: list[str | None] = [None]
    figures: list[Figure | None] = [None]
    sinks: list[list[str] | None] = [None]  # where text goes: the innermost open caption's words, or the title's
    walker = etree.iterwalk(root, events=("start", "end"))
    for event, element in walker:
        if event == "end":
            languages.pop(), figures.pop(), sinks.pop()
            _take(element.tail, sinks[-1])
            continue
        if found.visited >= MAX_ELEMENTS:
            break
        found.visited += 1
        languages.append(_language(element, languages[-1]))
        figures.append(_figure(element, figures[-1], found))
        sinks.append(_sink(element, figures[-1], sinks[-1], found))
        _take(element.text, sinks[-1])
        _gather(element, languages[-1], figures[-1], names, found)
        if len(sinks) > MAX_DEPTH:
            walker.skip_subtree()
    found.cut += sum(1 for _ in root.iter(etree.Element)) - found.visited
    return found


def _take(words: str | None, sink: list[str] | None) -> None:
    if words and sink is not None:
        sink.append(words)


def _figure(element: html.HtmlElement, around: Figure | None, found: Found) -> Figure | None:
    if element.tag != "figure":
        return around
    found.figures.append(Figure(around))
    return found.figures[-1]


def _sink(element: html.HtmlElement, figure: Figure | None, outer: list[str] | None, found: Found) -> list[str] | None:
    if element.tag == "figcaption" and figure:
        return figure.words
    if element.tag == "title" and found.title is None:
        found.title = []
        return found.title
    return outer


def _gather(
    element: html.HtmlElement, language: str | None, figure: Figure | None, names: tuple[str, str], found: Found
) -> None:
    """Keeps what an image, a link, a base or a robots tag says."""
    tag = element.tag
    if tag == "img":
        full = len(found.images) >= MAX_IMAGES
        found.cut += full
        if not full:
            found.images.append((element, language, figure))
    elif tag in ("a", "area") and (href := (element.get("href") or "").strip()):
        full = len(found.links) >= MAX_LINKS
        found.cut += full
        if not full and "nofollow" not in (element.get("rel") or "").lower().split():
            found.links.append(href)
    elif tag == "base":
        found.base = found.base or (element.get("href") or "").strip()
    elif tag == "meta" and (element.get("name") or "").strip().lower() in names:
        found.robots.append(element.get("content") or "")


def _join(base: str, href: str) -> str | None:
    """The absolute http address of `href`, or None."""
    if not href or len(href) > ADDRESS_CHARS:
        return None
    try:
        joined = urljoin(base, href)
        return joined if urlsplit(joined).scheme in ("http", "https") and urlsplit(joined).hostname else None
    except ValueError:
        return None


def _clip(value: str) -> str:
    return value.strip()[:RAW_CHARS]


def _language(element: html.HtmlElement, around: str | None) -> str | None:
    """The `lang` attribute that holds at an element."""
    own = next((element.get(name) for name in LANG if element.get(name)), None)
    return str(own).strip().lower()[:35] if own else around


def _image(
    image: html.HtmlElement, language: str | None, figure: Figure | None, base: str, title: dict[str, str | None]
) -> dict[str, Any] | None:
    source = (image.get("src") or "").strip()
    if not source:
        return None
    caption = figure.caption if figure else ""
    texts = [
        text(_clip(image.get("alt") or ""), "alt", language),
        text(caption, "caption", language),
        text(_clip(image.get("title") or ""), "img_title", language),
        title,
    ]
    address = _join(base, source) or source[:ADDRESS_CHARS].partition(":")[0] + ":"  # of data: only the scheme
    found = "figure" if caption else "img"
    return {"url": address, "texts": [entry for entry in texts if entry["text"]], "found": found}


def _links(hrefs: list[str], base: str) -> Iterator[str]:
    for href in hrefs:
        if address := _join(base, href):
            yield address.partition("#")[0]
