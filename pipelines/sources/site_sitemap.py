"""Sitemaps: lists of a site's pages that it publishes itself (sitemaps.org), plain or gzip, and lists of such lists.

Read by defusedxml with document types forbidden, so no entity is ever expanded; inflated to a limit and read to a
limit of entries. What lies beyond is counted in `cut`.
"""

import io
from typing import Any
from xml.etree.ElementTree import ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import iterparse

from pipelines.sources.archive_records import GZIP, inflated

MAX_BYTES = 50_000_000  # the protocol's own limits
MAX_ENTRIES = 50_000
ADDRESS_CHARS = 2_048


def read_sitemap(body: bytes) -> dict[str, Any]:
    """`links` (pages) and `more` (sitemaps) in order, `cut` entries that were left, and `failure`, or None."""
    found: dict[str, Any] = {"links": [], "more": [], "cut": 0, "failure": None}
    data = inflated(body, MAX_BYTES) if body.startswith(GZIP) else body
    if len(data) > MAX_BYTES:
        return found | {"failure": "too_large"}
    path: list[str] = []
    try:
        for event, element in iterparse(io.BytesIO(data), events=("start", "end"), forbid_dtd=True):
            if event == "start":
                path.append(element.tag.rpartition("}")[2])
                continue
            _take(path, (element.text or "").strip(), found)
            path.pop()
            element.clear()
    except (ParseError, DefusedXmlException, ValueError, LookupError):
        found["failure"] = "damaged"
    return found


def _take(path: list[str], words: str, found: dict[str, Any]) -> None:
    if len(path) < 2:
        return
    kept = {("url", "loc"): found["links"], ("sitemap", "loc"): found["more"]}.get((path[-2], path[-1]))
    if kept is None or not words:
        return
    if len(words) > ADDRESS_CHARS or len(found["links"]) + len(found["more"]) >= MAX_ENTRIES:
        found["cut"] += 1
    else:
        kept.append(words)
