"""Archives read file by file, on Ray or inline, and resumed by file: what `warc` and `wat` have in common.

Each finished file's rows land as one table below `crawl/<source>/<increment>/`, named by what was read and how, so a
killed run reads no finished file again. Rows are cleaned where they are found, which keeps the work on the workers;
a table holds 20,000 of them in a row group, so memory is bounded however large a file is.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.compute import map_shards
from pairs.errors import PairmillError
from pairs.fingerprint import fingerprint
from pairs.store import Store, file_system
from pairs.workspace import Dead
from pipelines.merge import SPILLED, clean, living
from pipelines.sources import Context, Row

VERSION = 3  # raise it when an equal archive gives other rows
GROUP_ROWS = 20_000


@dataclass(frozen=True)
class Limits:
    """What reading an archive depends on. `agent` is who robots tags may speak to."""

    agent: str
    max_page_bytes: int


Page = tuple[str, list[Row], bool]  # what came of it (ok, or why nothing), its rows, whether some of it was cut
Reader = Callable[[IO[bytes], Limits], Iterator[Page]]


@dataclass(frozen=True)
class Archives:
    """What archive sources are set by. `path` is a file, a pattern or a list of them, local or at any fsspec address.
    What is larger than `max_page_bytes` is left out and counted."""

    path: str | list[str]
    max_page_bytes: int = 5_000_000

    def rows(self, context: Context, what: str, read: "Reader") -> Iterator[Row]:
        files = paths(self.path, f"sources.{context.name}", what)
        return read_archives(context, files, read, Limits(context.fetch.agent, self.max_page_bytes))


def paths(patterns: str | list[str], where: str, what: str) -> list[str]:
    """The files that a path, a pattern or a list of them names, local or at any fsspec address, each once."""
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        fs, path = file_system(pattern)
        names = sorted(fs.glob(path)) if any(mark in path for mark in "*?[") else [path] * bool(fs.isfile(path))
        if not names:
            raise PairmillError(
                expected=f"{what} at {where}.path", found=f"no file at {pattern!r}", remedy="correct the path"
            )
        found |= dict.fromkeys(str(fs.unstrip_protocol(name)) for name in names)
    return list(found)


def read_archives(context: Context, files: list[str], read: Reader, limits: Limits) -> Iterator[Row]:
    """The rows of the archives in order of `files`; what was counted goes into the context."""
    store, folder = context.workspace.store, f"crawl/{context.name}/{context.increment}/files"
    tables = [f"{folder}/{_mark(path, read, limits)}.parquet" for path in files]
    done = set(store.files(folder, ".parquet"))
    left = [(path, table) for path, table in zip(files, tables, strict=True) if table not in done]
    finished = len(files) - len(left)
    work = partial(_read_file, store, read, limits, context.workspace.tombstones())
    for _ in map_shards(work, left, engine=context.engine, workers=context.workers):
        finished += 1
        context.progress(finished, len(files), f"{finished} files")
    for table in tables:
        yield from _rows(store, table, context)


def _mark(path: str, read: Reader, limits: Limits) -> str:
    """Over what is read and how: a file that grew or was replaced by one of another size is read again."""
    fs, inside = file_system(path)
    kind = f"{read.__module__}.{read.__qualname__}"
    return fingerprint({"archive": VERSION, "read": kind, "path": path, "size": fs.size(inside), **vars(limits)})


def _read_file(store: Store, read: Reader, limits: Limits, dead: Dead, item: tuple[str, str]) -> None:
    path, table = item
    pages, dropped, held = Counter[str](), Counter[str](), list[Row]()
    with (
        store.writing(table) as out,
        pq.ParquetWriter(out, SPILLED, compression="zstd") as writer,
        fsspec.open(path, "rb").open() as file,
    ):
        for fate, rows, cut in read(file, limits):
            pages[fate] += 1
            pages["cut"] += cut
            held += living((kept for row in rows if (kept := clean(row, dropped)) is not None), dead, dropped)
            if len(held) >= GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(held, schema=SPILLED))
                held = []
        writer.write_table(pa.Table.from_pylist(held, schema=SPILLED))
        writer.add_key_value_metadata({"counts": json.dumps([pages or {"empty_archive": 1}, dropped])})


def _rows(store: Store, table: str, context: Context) -> Iterator[Row]:
    with store.fs.open(store.full(table)) as file, pq.ParquetFile(file) as reader:
        pages, dropped = json.loads(reader.metadata.metadata[b"counts"])
        context.pages.update(pages)
        context.dropped.update(dropped)
        for batch in reader.iter_batches():
            yield from batch.to_pylist()


def placed(images: Iterable[dict[str, Any]], page: str, opt_out: str | None) -> list[Row]:
    """The rows of a page's images, in their order."""
    return [{**image, "page": page, "opt_out": opt_out, "position": n} for n, image in enumerate(images)]
