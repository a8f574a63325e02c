"""`warc`: web archives (WARC 1.0 and 1.1, plain or gzip): the images of every HTML page that answered 200, with the
texts around them.

A page gives the record that `site` gives for it. Whatever else an archive holds is counted by reason: answers with
another status, other types, pages that are too large, records that are broken, archives that were cut.
"""

from collections.abc import Iterator
from typing import IO

from pipelines.sources import Context, Row
from pipelines.sources.archive_files import Archives, Limits, Page, placed
from pipelines.sources.archive_records import Record, body, http_answer, records
from pipelines.sources.html_page import read_page

PAGES = frozenset({"text/html", "application/xhtml+xml"})


class Source(Archives):
    """Archives and their settings."""

    def candidates(self, context: Context) -> Iterator[Row]:
        return self.rows(context, "a WARC file", read_pages)


def read_pages(file: IO[bytes], limits: Limits) -> Iterator[Page]:
    """What came of every response in the archive."""
    for record in records(file, limits.max_page_bytes):
        if isinstance(record, str):
            yield record, [], False
        elif record.headers.get("warc-type") == "response":
            try:
                yield _page(record, limits)
            except OSError:
                raise
            except Exception:  # whatever a stranger wrote, it costs its own page alone
                yield "broken_page", [], False


def _page(record: Record, limits: Limits) -> Page:
    answer, address = http_answer(record.block), record.headers.get("warc-target-uri", "").strip("<>")
    if answer is None or not address:
        return "broken_record", [], False
    if answer.status != 200:
        return f"http_{answer.status}", [], False
    if (answer.header("content-type") or "text/html").partition(";")[0].strip().lower() not in PAGES:
        return "not_a_page", [], False
    content = "too_large" if record.size > len(record.block) else body(answer, limits.max_page_bytes)
    if isinstance(content, str):
        return content, [], False
    page = read_page(address, content, answer.headers, limits.agent)
    return "ok", placed(page["images"], address, page["opt_out"]), page["cut"] > 0
