"""`wat`: Common Crawl's WAT files: what its crawler noted of each page (JSON in WARC metadata records), a tenth of the
WARC's size and without the page itself.

So there are fewer texts than in the WARC: `alt`, `title` and the page's title, no captions, no lazy attributes. Robots
tags and headers are there. https://commoncrawl.org, "WAT response format".
"""

import json
from collections.abc import Iterator
from typing import IO, Any

from pipelines.sources import Context, Row, text
from pipelines.sources.archive_files import Archives, Limits, Page, placed
from pipelines.sources.archive_records import records
from pipelines.sources.html_page import MAX_IMAGES, Words, forbids, join, robots_names

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
    headers = [(name, str(value)) for name, value in response.get("Headers", {}).items()]
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
    found = [_image(image, base, titles) for image in images[:MAX_IMAGES]]
    return "ok", placed(found, address, _opt_out(headers, head, limits.agent)), len(images) > MAX_IMAGES


def _image(link: dict[str, Any], base: str, titles: list[Words]) -> dict[str, Any]:
    said = {"alt": link.get("alt"), "img_title": link.get("title")}
    texts = [text(str(words), kind) for kind, words in said.items() if words]
    address = str(link.get("url") or "").strip()
    full = join(base, address) or address.partition(":")[0] + ":"
    return {"url": full, "texts": texts + titles, "found": "img"}


def _opt_out(headers: list[tuple[str, str]], head: dict[str, Any], agent: str) -> str | None:
    metas = [(str(meta.get("name", "")).lower(), str(meta.get("content", ""))) for meta in head.get("Metas", [])]
    robots = [content for name, content in metas if name in robots_names(agent)]
    return forbids(headers, robots, ("tdm-reservation", "1") in metas, agent)[1]
