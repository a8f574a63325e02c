"""`urls`: a table of image URLs and their texts: Parquet, CSV or JSON lines, local or at any fsspec address. LAION's
and DataComp's columns are known by their names.

Read in batches, so that a table of any size passes in little memory. A line that can't be read stops the run with
its number: a table is the user's own, unlike what it points to.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pairs.errors import PairmillError
from pairs.store import file_system
from pairs.strict import nearest
from pipelines.sources import Context, Row, text

FIELDS = ("url", "text", "language", "page", "license", "source_uid")
DEFAULT_COLUMNS = {"url": "url", "text": "text"}  # stands for: whichever of the layouts fits
LAYOUTS = (  # a table has `url` and `text` of the one that is taken, and may have its others
    {**DEFAULT_COLUMNS, "source_uid": "uid"},  # DataComp
    {"url": "URL", "text": "TEXT", "language": "LANGUAGE", "source_uid": "SAMPLE_ID"},  # LAION
)


@dataclass(frozen=True)
class Source:
    """`path` is a file or a pattern such as `laion/*.parquet`. `columns` says which of the table's columns hold
    `url`, `text`, `language`, `page`, `license` and `source_uid`; without it LAION's and DataComp's are recognised."""

    path: str
    columns: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_COLUMNS))

    def candidates(self, context: Context) -> Iterator[Row]:
        where = f"sources.{context.name}"
        for name in self.columns:
            if name not in FIELDS:
                raise PairmillError(
                    expected=f"a known key at {where}.columns", found=repr(name), remedy=nearest(name, list(FIELDS))
                )
        columns = self.columns if "url" in self.columns else self.columns | {"url": "url"}
        for path in _paths(self.path, where):
            for row in _rows(path, columns, where):
                yield _candidate(row)


def _candidate(row: dict[str, Any]) -> Row:
    plain = {name: None if value is None else str(value) for name, value in row.items()}
    words = plain.get("text")
    texts = [text(words, "alt", plain.get("language"))] if words else []
    return {
        "url": plain["url"] or "",
        "texts": texts,
        "found": "row",
        **{k: plain.get(k) for k in ("page", "license", "source_uid")},
    }


def _paths(pattern: str, where: str) -> list[str]:
    fs, path = file_system(pattern)
    found = sorted(fs.glob(path)) if any(mark in path for mark in "*?[") else [path] * bool(fs.isfile(path))
    if not found:
        raise PairmillError(
            expected=f"a table at {where}.path", found=f"no file at {pattern!r}", remedy="correct the path"
        )
    return [str(fs.unstrip_protocol(name)) for name in found]


def _rows(path: str, columns: dict[str, str], where: str) -> Iterator[dict[str, Any]]:
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines, ".ndjson": _json_lines}
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in readers:
        raise PairmillError(
            expected=f"a file of {', '.join(readers)} at {where}.path", found=path, remedy="rename or convert it"
        )
    try:
        with fsspec.open(path, "rb").open() as file:
            yield from readers[suffix](file, columns, path)
    except (pa.ArrowException, csv.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PairmillError(expected=f"a whole {suffix} table at {path}", found=str(error), remedy="mend it") from None


def _chosen(present: list[str], columns: dict[str, str], path: str) -> dict[str, str]:
    """Which of the `present` columns holds what."""
    if columns == DEFAULT_COLUMNS:
        fitting = (layout for layout in LAYOUTS if {layout["url"], layout["text"]} <= set(present))
        columns = {
            name: column for name, column in next(fitting, columns).items() if column in [*present, "url", "text"]
        }
    for column in columns.values():
        if column not in present:
            raise PairmillError(
                expected=f"a column {column!r} in {path}",
                found=f"columns {', '.join(present)}",
                remedy=f"name it in `columns`: {nearest(column, present)}",
            )
    return columns


def _parquet(file: IO[bytes], columns: dict[str, str], path: str) -> Iterator[dict[str, Any]]:
    table = pq.ParquetFile(file)
    chosen = _chosen(table.schema_arrow.names, columns, path)
    for batch in table.iter_batches(columns=list(chosen.values())):
        yield from ({name: row[column] for name, column in chosen.items()} for row in batch.to_pylist())


def _csv(file: IO[bytes], columns: dict[str, str], path: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(sys.maxsize, 1 << 24))
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    chosen = _chosen(list(reader.fieldnames or []), columns, path)
    yield from ({name: row[column] for name, column in chosen.items()} for row in reader)


def _json_lines(file: IO[bytes], columns: dict[str, str], path: str) -> Iterator[dict[str, Any]]:
    """A line may leave out what it doesn't have, but the address."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise json.JSONDecodeError(f"line {number}: {error}", "", 0) from None
        upper = columns == DEFAULT_COLUMNS and isinstance(row, dict) and "url" not in row
        chosen = LAYOUTS[upper] if columns == DEFAULT_COLUMNS else columns
        if not isinstance(row, dict) or chosen["url"] not in row:
            raise PairmillError(
                expected=f"an object with {columns['url']!r} in line {number} of {path}",
                found=line[:100].decode("utf-8", "replace").strip(),
                remedy="name the right key in `columns`, or mend the line",
            )
        yield {name: row.get(column) for name, column in chosen.items()}
