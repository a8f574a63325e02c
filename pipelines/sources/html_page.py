"""What a page says: its images with the texts around them, its links, and what it forbids. One code for every source
that reads HTML, so that an equal page gives an equal record whether it is crawled or lies in an archive.

lxml finds the tags that matter in C; what holds around one of them (language, figure, caption) is climbed for once per
element and remembered, so a page costs no more than its size however it nests. About 1 ms for 13 kB; resiliparse 2.0.1
parses as fast, but asking its tree costs 30 times as much. What lies beyond the limits below is counted in `cut`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from lxml import etree, html
from w3lib.encoding import html_to_unicode

from pipelines.fetch.robots import OPT_OUT, RESERVED, agent_token, directives
from pipelines.sources import text
from pipelines.sources.html_image import ADDRESS_CHARS, best_address, best_of

RAW_CHARS = 10_002
MAX_IMAGES = 2_000
MAX_LINKS = 20_000
LANG = ("lang", "{http://www.w3.org/XML/1998/namespace}lang")
NO_FOLLOW = frozenset({"nofollow", "none"})
TAGS = ("img", "source", "figcaption", "title", "base", "meta", "a", "area", "link")
SILENT = frozenset({"script", "style", "template"})
BLOCKS = frozenset({"br", "p", "div", "li", "ul", "ol", "dl", "dt", "dd", "tr", "td", "th", "table", "pre", "hr"})
LICENCES = ("creativecommons.org/licenses/", "creativecommons.org/publicdomain/")
OG_IMAGE = frozenset({"og:image", "og:image:url", "og:image:secure_url"})
TDM = "tdm-reservation"


Words = dict[str, str | None]


class Around(NamedTuple):
    """What holds at an element: the nearest `lang`, figure, figcaption and picture, itself included. A picture may be
    far up, because libxml2 doesn't know that `source` is empty: the next tags land inside it."""

    language: str | None
    figure: html.HtmlElement | None
    caption: html.HtmlElement | None
    picture: html.HtmlElement | None


NOWHERE = Around(None, None, None, None)


@dataclass
class Found:
    """What a page's tags gave. Figures are known by their element; `licences` by figure, None for the page's own."""

    names: tuple[str, str]  # of the meta tags that speak to robots
    around: dict[html.HtmlElement, Around] = field(default_factory=dict)
    title: str | None = None
    base: str = ""
    robots: list[str] = field(default_factory=list)
    reserved: bool = False  # by the TDM Reservation Protocol
    images: list[html.HtmlElement] = field(default_factory=list)
    sources: dict[html.HtmlElement, tuple[tuple[int, float], str]] = field(default_factory=dict)  # best, by picture
    captions: dict[html.HtmlElement, list[str]] = field(default_factory=dict)
    licences: dict[html.HtmlElement | None, tuple[bool, str]] = field(default_factory=dict)
    og: list[tuple[str, str]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    cut: int = 0


def read_page(url: str, body: bytes, headers: Sequence[tuple[str, str]], agent: str) -> dict[str, Any]:
    """A page's record: `images` (url, texts, found, license), `links` as found (without fragment), `opt_out`,
    `cut`, the number of elements beyond the limits, and `dated`, as `is_dated` says. `headers` are pairs of name
    and value."""
    root, cut = _parse(body, next((value for name, value in headers if name.lower() == "content-type"), None))
    found = Found(robots_names(agent), cut=cut)
    for element in root.iter(*TAGS):
        GATHER[element.tag](element, found)
    base = join(url, found.base) or url
    words, opt_out = forbids(headers, found.robots, found.reserved, agent)
    language, title = _language(root, None), _clip(found.title)
    titles = [text(title, "title", language)] if title else []
    return {
        "images": [*_images(found, base, titles), *og_images(found, base, language, titles)],
        "links": [] if words & NO_FOLLOW else sorted({a.partition("#")[0] for a in _joined(found.links, base)}),
        "opt_out": opt_out,
        "cut": found.cut,
        "dated": is_dated(headers, found.robots),
    }


def is_dated(headers: Sequence[tuple[str, str]], metas: Sequence[str] = ()) -> bool:
    """Whether a page's headers or its robots tags `metas` name a date after which it may not be used."""
    told = [*metas, *(value for name, value in headers if name.lower() == "x-robots-tag")]
    return any("unavailable_after" in value.lower() for value in told)


def robots_names(agent: str) -> tuple[str, str]:
    """The names of the meta tags that speak to robots and to us."""
    return "robots", agent_token(agent)


def forbids(
    headers: Sequence[tuple[str, str]], metas: list[str], reserved: bool, agent: str
) -> tuple[set[str], str | None]:
    """The robots words of a page's headers and of its robots tags `metas`, and the opt-out among them. `reserved` says
    that a tag reserves the rights by the TDM Reservation Protocol, as a header may do too."""
    told = [(name.lower(), value.strip()) for name, value in headers]
    words = directives([*(value for name, value in told if name == "x-robots-tag"), *metas], agent)
    reserved = reserved or (TDM, "1") in told
    return words, min(words & OPT_OUT, default=RESERVED if reserved else None)


def _parse(body: bytes, content_type: str | None) -> tuple[html.HtmlElement, int]:
    """The tree of a page in whatever encoding, and 1 where the parser ended before it (2,048 levels deep)."""
    _, plain = html_to_unicode(content_type, body, default_encoding="cp1252", auto_detect_fun=_utf8)
    data = plain.replace("\0", "").encode("utf-8", "replace")
    parser = html.HTMLParser(recover=True, encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        root = html.document_fromstring(data, parser=parser)
    except etree.ParserError:  # nothing but blanks, a document type or a comment
        root = html.Element("html")
    return root, any("depth" in error.message for error in parser.error_log)


def _utf8(body: bytes) -> str | None:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return None
    return "utf-8"


def around(element: html.HtmlElement, known: dict[html.HtmlElement, Around]) -> Around:
    """What holds at `element`; all that is climbed over is remembered in `known`."""
    path, node = [], element
    while node is not None and node not in known:
        path.append(node)
        node = node.getparent()
    held = NOWHERE if node is None else known[node]
    for node in reversed(path):
        figure = node if node.tag == "figure" else held.figure
        caption = node if node.tag == "figcaption" else held.caption
        picture = node if node.tag == "picture" else held.picture
        held = known[node] = Around(_language(node, held.language), figure, caption, picture)
    return held


def _language(element: html.HtmlElement, outer: str | None) -> str | None:
    """The `lang` attribute that holds at an element."""
    own = next((element.get(name) for name in LANG if element.get(name)), None)
    return str(own).strip().lower()[:35] if own else outer


def _take_image(element: html.HtmlElement, found: Found) -> None:
    _add(found.images, element, MAX_IMAGES, found)


def _take_source(element: html.HtmlElement, found: Found) -> None:
    picture = around(element, found.around).picture
    if picture is not None and (best := best_of(element)):
        held = found.sources.get(picture)
        found.sources[picture] = best if held is None or best[0] > held[0] else held


def _take_caption(element: html.HtmlElement, found: Found) -> None:
    """The words of a figcaption and of those in it, to their own figures; each is walked once, from the outermost."""
    parent = element.getparent()
    if parent is not None and around(parent, found.around).caption is not None:
        return
    sinks: list[list[str]] = []
    for event, node in etree.iterwalk(element, events=("start", "end")):
        gap = " " if node.tag in BLOCKS else ""
        if event == "start":
            figure = around(node, found.around).figure
            sinks.append(found.captions.setdefault(figure, []) if node.tag == "figcaption" else sinks[-1])
            sinks[-1].append(gap + (node.text or "" if node.tag not in SILENT else ""))
        else:
            sinks.pop()
            if sinks:
                sinks[-1].append(gap + (node.tail or ""))


def _take_title(element: html.HtmlElement, found: Found) -> None:
    parent = element.getparent()
    if found.title is None and (parent is None or parent.tag != "svg"):
        found.title = "".join(element.itertext())


def _take_base(element: html.HtmlElement, found: Found) -> None:
    found.base = found.base or (element.get("href") or "").strip()


def take_meta(element: Mapping[str, Any], found: Found) -> None:
    """A meta tag's words, into `robots`, `og` or `reserved`."""
    name = str(element.get("name") or element.get("property") or "").strip().lower()
    content = str(element.get("content") or "").strip()
    if name in found.names:
        found.robots.append(content)
    elif name.startswith("og:"):
        _add(found.og, (name, content), MAX_IMAGES, found)
    elif name == TDM:
        found.reserved |= content == "1"


def _take_link(element: html.HtmlElement, found: Found) -> None:
    href = (element.get("href") or "").strip()
    words = (element.get("rel") or "").lower().split()
    if is_licence(words, href):
        take_licence(around(element, found.around).figure, words, href, found)
    if href and element.tag != "link" and "nofollow" not in words:
        _add(found.links, href, MAX_LINKS, found)


def is_licence(words: list[str], href: str) -> bool:
    """Whether a link with these words in `rel` is to a licence."""
    return bool(href) and ("license" in words or any(mark in href for mark in LICENCES))


def take_licence(figure: html.HtmlElement | None, words: list[str], href: str, found: Found) -> None:
    """A figure's licence, or with None the page's: the first that is called so, or else the first of a known one."""
    meant = "license" in words
    if figure not in found.licences or (meant and not found.licences[figure][0]):
        found.licences[figure] = meant, href


GATHER = {
    **dict.fromkeys(("a", "area", "link"), _take_link),
    **{"img": _take_image, "source": _take_source, "figcaption": _take_caption},
    **{"title": _take_title, "base": _take_base, "meta": take_meta},
}


def _add(items: list[Any], item: Any, most: int, found: Found) -> None:
    if len(items) < most:
        items.append(item)
    else:
        found.cut += 1


def _images(found: Found, base: str, titles: list[Words]) -> Iterator[dict[str, Any]]:
    captions = _captions(found)
    for image in found.images:
        language, figure, _, picture = around(image, found.around)
        address = best_address(image, found.sources.get(picture))
        if not address:
            continue
        caption = captions[figure]
        said = {"alt": image.get("alt"), "caption": caption, "img_title": image.get("title")}
        texts = [text(_clip(value), kind, language) for kind, value in said.items() if _clip(value)]
        # of data: only the scheme
        full = join(base, address) or address[:ADDRESS_CHARS].partition(":")[0] + ":"
        yield {
            "url": full,
            "texts": texts + titles,
            "found": "figure" if caption else "img",
            "license": licence(found, figure, base),
        }


def _captions(found: Found) -> dict[html.HtmlElement | None, str]:
    """The caption of each figure that holds an image; one without a caption has that of the figure around."""
    own = {figure: _clip("".join(words)) for figure, words in found.captions.items()}
    told: dict[html.HtmlElement | None, str] = {figure: words for figure, words in own.items() if words} | {None: ""}
    for image in found.images:
        path: list[html.HtmlElement] = []
        node = around(image, found.around).figure
        while node is not None and node not in told:
            path.append(node)
            outer = node.getparent()
            node = around(outer, found.around).figure if outer is not None else None
        told.update(dict.fromkeys(path, told[node]))
    return told


def licence(found: Found, figure: html.HtmlElement | None, base: str) -> str | None:
    """The address of the licence that the image's own figure names, or else the page."""
    named = found.licences.get(figure) or found.licences.get(None)
    return join(base, named[1]) if named else None


def og_images(found: Found, base: str, language: str | None, titles: list[Words]) -> Iterator[dict[str, Any]]:
    """The images that the page names for itself (Open Graph), each with the page's own words."""
    about = {name: words for name, words in reversed(found.og) if name in ("og:title", "og:description")}
    alts: dict[str, str] = {}
    last = ""
    for name, content in found.og:
        if name in OG_IMAGE and content:
            last = content
            alts.setdefault(last, "")
        elif name == "og:image:alt" and last:
            alts[last] = alts[last] or content
    for address, alt in alts.items():
        said = [alt, about.get("og:title"), about.get("og:description")]
        texts = [text(_clip(value), "og", language) for value in said if _clip(value)]
        if full := join(base, address):
            yield {"url": full, "texts": texts + titles, "found": "og", "license": licence(found, None, base)}


def _joined(hrefs: list[str], base: str) -> Iterator[str]:
    return (address for href in hrefs if (address := join(base, href)))


def join(base: str, href: str) -> str | None:
    """The absolute http address of `href`, or None."""
    if not href or len(href) > ADDRESS_CHARS:
        return None
    try:
        joined = urljoin(base, href)
        return joined if urlsplit(joined).scheme in ("http", "https") and urlsplit(joined).hostname else None
    except ValueError:
        return None


def _clip(value: str | None) -> str:
    """Trimmed. What is longer than a kept text may be stays longer, also without a blank at its end, so that the cut is
    counted."""
    return " ".join((value or "").split())[:RAW_CHARS]
