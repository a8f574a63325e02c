"""`wat`: Common Crawl's WAT files: what its crawler noted of each page (JSON in WARC metadata records), a tenth of the
WARC's size and without the page itself.

So there are fewer texts than in the WARC: `alt`, `title` and the page's title, no captions, no lazy attributes. Robots
tags, headers, Open Graph and the licence that the page's head names are there; of one in its body nobody knows whether
it is a figure's. https://commoncrawl.org, "WAT response format".
"""

import json
from collections.abc import Iterator
from typing import IO, Any

from pipelines.sources import Context, Row, text
from pipelines.sources.archive_files import Archives, Limits, Page, placed
from pipelines.sources.archive_records import records
from pipelines.sources.html_page import (
    MAX_IMAGES,
    Found,
    Words,
    forbids,
    is_licence,
    join,
    licence,
    og_images,
    robots_names,
    take_licence,
    take_meta,
)

PAGES = ("text/html", "application/xhtml+xml")
IMAGES = frozenset({"IMG@/src", "IMG@/data-src"})
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class Source(Archives):
    """Archives and their settings."""

    def candidates(self, context: Context) -> Iterator[Row]:
        return self.rows(context, "a WAT file", read_notes)


def read_notes(file: IO[bytes], limits: Limits) -> Iterator[Page]:
    """What came of every response that the archive has a note of."""
    for record in records(file, limits.max_page_bytes):
        if isinstance(record, str):
            yield record, [], False
        elif record.headers.get("warc-type") == "metadata":
            if record.size > limits.max_page_bytes:
                yield "too_large", [], False
                continue
            try:
                page = _page(json.loads(record.block)["Envelope"], limits)
            except DAMAGED:
                page = "broken_record", [], False
            if page:
                yield page


def _page(envelope: dict[str, Any], limits: Limits) -> Page | None:
    """None where the note isn't about a response."""
    response = envelope["Payload-Metadata"].get("HTTP-Response-Metadata")
    if not response:
        return None
    status = str(response["Response-Message"]["Status"])
    headers = [(name, str(value)) for name, told in response.get("Headers", {}).items() for value in _each(told)]
    kind = next((value for name, value in headers if name.lower() == "content-type"), PAGES[0])
    if status != "200":
        return f"http_{status}", [], False
    if kind.partition(";")[0].strip().lower() not in PAGES:
        return "not_a_page", [], False
    html, address = response.get("HTML-Metadata", {}), envelope["WARC-Header-Metadata"]["WARC-Target-URI"]
    images = [link for link in html.get("Links", []) if link.get("path") in IMAGES]
    head = html.get("Head", {})
    title = (head.get("Title") or "").strip()
    base = join(address, head.get("Base") or "") or address
    titles = [text(title, "title")] if title else []
    found = _head(head, limits.agent)
    rows = [_image(image, base, titles) | {"license": licence(found, None, base)} for image in images[:MAX_IMAGES]]
    rows += og_images(found, base, None, titles)
    opt_out = forbids(headers, found.robots, found.reserved, limits.agent)[1]
    return "ok", placed(rows, address, opt_out), len(images) > MAX_IMAGES or found.cut > 0


def _each(told: Any) -> list[Any]:
    """The values of a header; one that came several times is a list."""
    return told if isinstance(told, list) else [told]


def _head(head: dict[str, Any], agent: str) -> Found:
    """What the tags of a page's head gave, read as in the page itself."""
    found = Found(robots_names(agent))
    for meta in head.get("Metas", []):
        take_meta(meta, found)
    for link in head.get("Link", []):
        words, href = str(link.get("rel") or "").lower().split(), str(link.get("url") or "").strip()
        if is_licence(words, href):
            take_licence(None, words, href, found)
    return found


def _image(link: dict[str, Any], base: str, titles: list[Words]) -> dict[str, Any]:
    said = {"alt": link.get("alt"), "img_title": link.get("title")}
    texts = [text(str(words), kind) for kind, words in said.items() if words]
    address = str(link.get("url") or "").strip()
    full = join(base, address) or address.partition(":")[0] + ":"
    return {"url": full, "texts": texts + titles, "found": "img"}
