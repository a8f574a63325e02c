"""Sitemaps: lists of a site's pages that it publishes itself (sitemaps.org), plain or gzip, and lists of such lists.

Read piece by piece by defusedxml with document types forbidden, so no entity is ever expanded and no tree is built:
what an element holds is forgotten when it ends. Bytes, entries, elements, depth and names are bounded; what lies
beyond is counted in `cut`, or as `too_large`. The largest that the protocol allows takes 0.3 s, the worst 2 s and 2 MB.
"""

import io
from typing import Any
from xml.etree.ElementTree import ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from pipelines.sources.archive_records import chunks

MAX_BYTES = 50_000_000  # inflated; the protocol's own limits, as the next
MAX_ENTRIES = 50_000
MAX_ELEMENTS = 1_000_000
MAX_DEPTH = 100
MAX_NAMES = 1_000  # of elements and attributes; the parser remembers each
MAX_SILENCE = 1_000_000  # bytes of one tag, comment or instruction
ADDRESS_CHARS = 2_048


class _TooLarge(Exception):
    pass


class _Entries:
    """What the parser tells its events to. `found` is what `read_sitemap` returns."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {"links": [], "more": [], "cut": 0, "failure": None}
        self.events = self._elements = self._chars = 0
        self._path: list[str] = []
        self._names: set[str] = set()
        self._words: list[str] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.events += 1
        self._elements += 1
        self._names.update((tag, *attributes))
        if self._elements > MAX_ELEMENTS or len(self._names) > MAX_NAMES or len(self._path) >= MAX_DEPTH:
            raise _TooLarge
        self._path.append(tag.rpartition("}")[2])
        self._begin()

    def data(self, words: str) -> None:
        self.events += 1
        if self._chars <= ADDRESS_CHARS:
            self._words.append(words)
            self._chars += len(words)

    def end(self, tag: str) -> None:
        self.events += 1
        kept = {"url/loc": self.found["links"], "sitemap/loc": self.found["more"]}.get("/".join(self._path[-2:]))
        words = "".join(self._words).strip()
        if kept is not None and words:
            if len(words) > ADDRESS_CHARS or len(self.found["links"]) + len(self.found["more"]) >= MAX_ENTRIES:
                self.found["cut"] += 1
            else:
                kept.append(words)
        self._path.pop()
        self._begin()

    def _begin(self) -> None:
        self._words, self._chars = [], 0

    def close(self) -> None:
        pass


def read_sitemap(body: bytes) -> dict[str, Any]:
    """`links` (pages) and `more` (sitemaps) in order, `cut` entries that were left, and `failure`, or None; with one,
    the entries before it are kept."""
    entries = _Entries()
    try:
        _feed(body, entries)
    except _TooLarge:
        entries.found["failure"] = "too_large"
    except (ParseError, DefusedXmlException, ValueError, LookupError):
        entries.found["failure"] = "damaged"
    return entries.found


def _feed(body: bytes, entries: _Entries) -> None:
    parser = DefusedXMLParser(target=entries, forbid_dtd=True)
    size = silent = 0
    for piece in chunks(io.BytesIO(body)):
        if piece is None:
            raise ValueError("a damaged gzip member")
        size, before = size + len(piece), entries.events
        parser.feed(piece)
        silent = 0 if entries.events > before else silent + len(piece)
        if size > MAX_BYTES or silent > MAX_SILENCE:
            raise _TooLarge
    parser.close()
