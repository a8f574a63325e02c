"""What a page says: its images with the texts around them, its links, and what it forbids.

Texts of an image are its `alt`, the `figcaption` of the innermost figure around it, its own `title` attribute and
the page's title. Each element is visited a fixed number of times, so that no page costs more than its size.
"""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urljoin, urlsplit

from lxml import html
from scrapy.http import HtmlResponse

from pairs.identity import canonical_url
from pipelines.fetch.robots import OPT_OUT, agent_token, directives
from pipelines.sources import text

RAW_CHARS = 20_000
LANG = ("lang", "{http://www.w3.org/XML/1998/namespace}lang")
NO_FOLLOW = frozenset({"nofollow", "none"})


def read_page(response: HtmlResponse, agent: str) -> dict[str, Any]:
    """A page's record: `images` (url, texts, found, license), `links` and `opt_out`."""
    root = response.selector.root
    base = _base(root, response.url)
    header = [value.decode("latin-1") for value in response.headers.getlist("X-Robots-Tag")]
    words = directives([*header, *_meta_robots(root, agent)], agent)
    title = _clip("".join(root.xpath("string((//head/title | //title)[1])")))
    captions = {image: _words(caption) for figure, caption in _figures(root) for image in figure.iter("img")}
    images = [_image(image, base, captions.get(image), title, _language(root)) for image in root.iter("img")]
    return {
        "images": [image for image in images if image],
        "links": [] if words & NO_FOLLOW else sorted(set(_links(root, base))),
        "opt_out": min(words & OPT_OUT, default=None),
    }


def _base(root: html.HtmlElement, url: str) -> str:
    href = root.xpath("string(//base/@href)").strip()
    return _join(url, href) or url


def _join(base: str, href: str) -> str | None:
    """The absolute http address of `href`, or None."""
    try:
        joined = urljoin(base, href.strip())
        return joined if urlsplit(joined).scheme in ("http", "https") and urlsplit(joined).hostname else None
    except ValueError:
        return None


def _meta_robots(root: html.HtmlElement, agent: str) -> list[str]:
    names = ("robots", agent_token(agent))
    metas = root.iter("meta")
    return [meta.get("content", "") for meta in metas if meta.get("name", "").strip().lower() in names]


def _figures(root: html.HtmlElement) -> Iterator[tuple[html.HtmlElement, html.HtmlElement]]:
    """Figures that have a caption, outer ones first, so that the innermost one's caption holds."""
    for caption in root.iter("figcaption"):
        figure = next(caption.iterancestors("figure"), None)
        if figure is not None:
            yield figure, caption


def _words(element: html.HtmlElement) -> str:
    return _clip(" ".join(element.itertext()))


def _clip(value: str) -> str:
    return value.strip()[:RAW_CHARS]


def _language(element: html.HtmlElement) -> str | None:
    """The `lang` attribute that holds at an element."""
    for holder in (element, *element.iterancestors()):
        found = next((holder.get(name) for name in LANG if holder.get(name)), None)
        if found:
            return str(found).strip().lower()[:35]
    return None


def _image(
    image: html.HtmlElement, base: str, caption: str | None, title: str, page_language: str | None
) -> dict[str, Any] | None:
    source = (image.get("src") or "").strip()
    if not source:
        return None
    language = _language(image)
    texts = [
        text(_clip(image.get("alt") or ""), "alt", language),
        text(caption or "", "caption", language),
        text(_clip(image.get("title") or ""), "img_title", language),
        text(title, "title", page_language),
    ]
    address = _join(base, source) or source.partition(":")[0] + ":"  # of data: and the like only the scheme
    found = "figure" if caption else "img"
    return {"url": address, "texts": [entry for entry in texts if entry["text"]], "found": found}


def _links(root: html.HtmlElement, base: str) -> Iterator[str]:
    for tag in ("a", "area"):
        for link in root.iter(tag):
            if "nofollow" not in (link.get("rel") or "").lower().split():
                address = _join(base, link.get("href") or "")
                if address and link.get("href"):
                    yield canonical_url(address)
