"""Takes addresses and texts out of what is written freely: logs, failures, the crawl's records, reports, Prefect's
database. Tables and tars are the business of `takedown.py`.

Only places where free text stands are touched, and JSON by its values: a page's text that looks like our own syntax
must not be able to break a file. Addresses always go; texts where they are long enough to mean this pair. A database
is only written to where a needle stands in it (also in a deleted row or its write-ahead log), then it is vacuumed.
"""

import contextlib
import json
import re
import sqlite3
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from pairs.errors import PairmillError
from pairs.identity import canonical_url
from pairs.workspace import Dead, Workspace
from pipelines.report.page import render
from pipelines.sources.site import without_dead

GONE = "[forgotten]"
TEXT_CHARS = 12  # shorter texts mean many pairs
FREE = ("error", "trace", "note")  # the keys of stages.json and report.json that hold messages
BUSY_S = 30.0


def needles(urls: Iterable[str], texts: Iterable[str]) -> list[str]:
    """What is looked for, the longest first: each address and each longer text, also as JSON writes them."""
    plain = {form for u in urls if u for form in (u, canonical_url(u))} | {
        t for t in texts if t and len(t) >= TEXT_CHARS and " " in t
    }
    escaped = {json.dumps(text, ensure_ascii=ascii_)[1:-1] for text in plain for ascii_ in (True, False)}
    return sorted(plain | escaped, key=lambda text: (-len(text), text))


def scrub(workspace: Workspace, found: list[str], dead: Dead, uids: Collection[str]) -> None:
    """Goes through logs, stages, reports, crawl records and databases of a workspace."""
    store = workspace.store
    for path in [*store.files("", ".log"), *store.files("crawl", "log.txt")]:
        _rewrite(workspace, path, lambda text: _without(text, found))
    for path in store.files("runs", "/stages.json"):
        _rewrite(workspace, path, lambda text: json.dumps(_messages(json.loads(text), found), indent=1, sort_keys=True))
    for path in store.files("runs", "/report.json"):
        _report(workspace, path, found, uids)
    for path in store.files("crawl", "/pages.jsonl"):
        _rewrite(workspace, path, lambda text: _pages(text, dead))
    if store.local:
        for database in sorted(store.local.rglob("*.db")):
            _database(database, found)


def _rewrite(workspace: Workspace, path: str, change: Callable[[str], str]) -> None:
    before = workspace.store.read(path).decode("utf-8", "surrogateescape")
    after = change(before)
    if after != before:
        workspace.store.write(path, after.encode("utf-8", "surrogateescape"))


def _without(text: str, found: Iterable[str]) -> str:
    for needle in found:
        if needle in text:
            text = text.replace(needle, GONE)
    return text


def _messages(value: Any, found: list[str]) -> Any:
    """A JSON value whose messages are free of what was found."""
    if isinstance(value, dict):
        kept = {key: _without(v, found) if key in FREE and isinstance(v, str) else v for key, v in value.items()}
        return {key: v if key in FREE else _messages(v, found) for key, v in kept.items()}
    return [_messages(item, found) for item in value] if isinstance(value, list) else value


def _report(workspace: Workspace, path: str, found: list[str], uids: Collection[str]) -> None:
    """Takes the pairs' cards out and renders the page anew; the page lands first, so that a kill between is mended."""
    told = json.loads(workspace.store.read(path))
    kept = _messages(_cards(told, uids), found)
    if kept != told:
        workspace.store.write(path.removesuffix("json") + "html", render(kept))
        workspace.store.write(path, json.dumps(kept, indent=1, sort_keys=True))


def _cards(value: Any, uids: Collection[str]) -> Any:
    """Without the cards (objects with an image) of `uids`, and without those that don't say whose they are."""
    if isinstance(value, dict):
        return {key: _cards(item, uids) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    theirs = [isinstance(v, dict) and "image" in v and ("uid" not in v or v["uid"] in uids) for v in value]
    return [_cards(item, uids) for item, gone in zip(value, theirs, strict=True) if not gone]


def _pages(text: str, dead: Dead) -> str:
    """The whole lines of a crawl's records without what is forgotten."""
    lines = []
    for line in text.split("\n")[:-1]:
        kept = without_dead(before := json.loads(line), dead)
        if kept is not None:
            lines.append((line if kept == before else json.dumps(kept)) + "\n")
    return "".join(lines)


def _database(path: Path, found: list[str]) -> None:
    raw = b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))
    if not raw.startswith(b"SQLite format 3"):
        return
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as base:
        try:
            base.execute("PRAGMA secure_delete = ON")
            changed = sum(_column(base, table, column, found) for table, column in _columns(base))
            if changed or any(needle.encode("utf-8", "surrogateescape") in raw for needle in found):
                base.execute("VACUUM")
                if base.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    raise sqlite3.OperationalError("database is locked")
        except sqlite3.OperationalError as error:
            raise PairmillError(
                expected=f"to take what is forgotten out of {path}",
                found=str(error),
                remedy="end the schedule or server that uses it, then run `pairmill forget` on the workspace again",
            ) from None


def _columns(base: sqlite3.Connection) -> list[tuple[str, str]]:
    """Every column of every plain table that can hold text."""
    query = "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE '%VIRTUAL%'"
    names = [name for (name,) in base.execute(query)]
    return [(name, row[1]) for name in names for row in base.execute(f'PRAGMA table_info("{name}")')]


def _column(base: sqlite3.Connection, table: str, column: str, found: list[str]) -> int:
    """Replaces the needles in a column; in values that are JSON only as JSON writes them. Returns the changed rows."""
    changed = 0
    query = f'SELECT DISTINCT "{column}" FROM "{table}" WHERE typeof("{column}") = \'text\' AND length("{column}") > 7'
    values = [value for (value,) in base.execute(query)]
    together = "\0".join(values)
    there = [needle for needle in found if needle in together]
    for value in values if there else []:
        kept = [n for n in there if n in value]
        if value[:1] in "{[":
            kept = [n for n in kept if not re.search(r'(?<!\\)"', n)]
        if (after := _without(value, kept)) != value:
            changed += base.execute(
                f'UPDATE "{table}" SET "{column}" = ? WHERE "{column}" = ?', (after, value)
            ).rowcount
    return changed
