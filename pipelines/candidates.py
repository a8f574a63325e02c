"""Cuts the next increment of a source: what it yields now, merged by `url_key`, less what earlier increments have.

The cut comes after the crawl has ended and sorts by `url_key`, and merged texts are ordered by where they stood,
so that crawl order never reaches the bytes. Every row that isn't taken is counted by reason. What failed for a
passing cause in its last increment joins the new one. Merging is in memory: about 1 kB per candidate.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from yarl import URL

from pairs.errors import PairmillError
from pairs.identity import canonical_url, url_key
from pairs.recipe import FetchSpec, SourceSpec
from pairs.schemas import CANDIDATES
from pairs.store import table_metadata
from pairs.workspace import Workspace, refused
from pipelines.sources import Context, Progress, Row, load_source

TEXT_CHARS = 10_000
MAX_TRIES = 5  # increments in which a candidate may fail for a passing cause
OPTED_OUT = "opt_out"
FREE = frozenset({"delay_s", "per_host", "max_pages", "max_depth"})  # say how far and how fast, not what


@dataclass(frozen=True)
class CutCounts:
    """`found` rows of the source = `new` candidates of the increment + all of `dropped`. Without new ones `increment`
    is None and nothing was written. `opt_out` counts the new ones that must not be fetched."""

    increment: str | None
    found: int
    new: int
    opt_out: int = 0
    buried: int = 0  # candidates of earlier increments that opted out meanwhile
    texts_cut: int = 0
    pages_cut: int = 0  # with more elements, images or links than are looked at
    dropped: dict[str, int] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)  # ok, or why a page gave nothing


def part(source: str, increment: str) -> str:
    """The path of an increment's candidates."""
    return f"candidates/{source}/{increment}/part-00000.parquet"


def cut_increment(
    workspace: Workspace, name: str, spec: SourceSpec, fetch_spec: FetchSpec, progress: Progress
) -> CutCounts:
    """Makes the next increment of the source `name`; call it under the workspace's lock. Raises PairmillError when the
    source is empty, can't be reached or is another than that of its increments, with nothing written."""
    check_settings(workspace, name, spec)
    earlier = workspace.increments(name)
    increment = next_increment(workspace, name)
    source = load_source(name, spec)
    context = Context(workspace, name, increment, tuple(spec.allow), fetch_spec, progress)
    rows = [_clean(row, context.dropped) for row in source.candidates(context)]
    found = len(rows) + context.dropped["link"] + context.dropped["bad_name"]
    if not found:
        raise PairmillError(
            expected=f"images in the source {name!r}", found="none", remedy="check its settings and what it holds"
        )
    merged = _merge([row for row in rows if row is not None])
    context.dropped["merged"] += sum(row is not None for row in rows) - len(merged)
    buried = _bury_opted_out(workspace, name, earlier, merged)
    kept = _without_earlier(workspace, name, earlier, merged, context.dropped)
    table = pa.Table.from_pylist(sorted(kept, key=lambda row: row["url_key"]), schema=CANDIDATES)
    counts = _counts(increment if kept else None, found, kept, buried, context)
    if kept:
        facts = {"counts": json.dumps(asdict(counts)), "settings": _settings(name, spec)}
        workspace.store.write_table(part(name, increment), table, facts)
    workspace.store.delete(f"crawl/{name}", recursive=True)  # its pages have done their work
    return counts


def next_increment(workspace: Workspace, name: str) -> str:
    """What the next increment of a source is called."""
    return f"{len(workspace.increments(name)):04d}"


def finished_cut(workspace: Workspace, name: str, increment: str) -> CutCounts | None:
    """What was counted when `increment` was cut, None where it isn't. Ends what a kill after the cut left to do."""
    if increment not in workspace.increments(name):
        return None
    workspace.store.delete(f"crawl/{name}", recursive=True)
    return CutCounts(**json.loads(_metadata(workspace, name, increment)["counts"]))


def check_settings(workspace: Workspace, name: str, spec: SourceSpec) -> None:
    """Refuses a source that was changed since its increments were cut: they would pass for what it is now."""
    now = _settings(name, spec)
    for increment in workspace.increments(name):
        before = _metadata(workspace, name, increment).get("settings", now)
        if before != now:
            old, new = json.loads(before), json.loads(now)
            changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
            raise PairmillError(
                expected=f"at sources.{name} what made its increment {increment}: {_shown(old, changed)}",
                found=_shown(new, changed),
                remedy="give the changed source a new name, or choose another --workspace",
            )


def _settings(name: str, spec: SourceSpec) -> str:
    """The kind and settings of a source as JSON, defaults included; without those in FREE, `trusted` and `allow`."""
    settings = asdict(load_source(name, spec))  # type: ignore[call-overload]
    return json.dumps({"kind": spec.kind} | {k: v for k, v in settings.items() if k not in FREE}, sort_keys=True)


def _shown(settings: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key}: {json.dumps(settings.get(key))[:200]}" for key in keys)


def _metadata(workspace: Workspace, name: str, increment: str) -> dict[str, str]:
    return table_metadata(workspace.store.read_table(part(name, increment), ["url_key"]))


def _counts(increment: str | None, found: int, kept: list[Row], buried: int, context: Context) -> CutCounts:
    opted = sum(row["opt_out"] is not None for row in kept)
    texts, pages = context.dropped.pop("text_cut", 0), context.pages.pop("cut", 0)
    dropped, fates = _plain(context.dropped), _plain(context.pages)
    return CutCounts(increment, found, len(kept), opted, buried, texts, pages, dropped, fates)


def _plain(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}


def _clean(row: Row, dropped: Counter[str]) -> Row | None:
    """The row with its key, address and trimmed texts; None where it has no address to fetch."""
    blank: dict[str, Any] = dict.fromkeys(CANDIDATES.names)
    if row.get("url_key") is None:
        reason = _bad_address(row["url"])
        if reason:
            dropped[reason] += 1
            return None
        row = row | {"url": _as_found(row["url"]), "url_key": url_key(row["url"])}
    texts = []
    for entry in row["texts"]:
        words = " ".join(entry["text"].encode("utf-8", "replace").decode().split())
        dropped["text_cut"] += len(words) > TEXT_CHARS
        if words:
            texts.append(entry | {"text": words[:TEXT_CHARS]})
    return blank | {"position": 0} | row | {"texts": texts}


def _as_found(url: str) -> str:
    """The address to ask for: as it stood, since a signature may cover the order of a query; its canonical form is for
    `url_key` alone. One that no line can hold is canonical all the same."""
    plain = url.strip().partition("#")[0]
    return plain if plain.isprintable() else canonical_url(url)


def _bad_address(url: str) -> str | None:
    scheme = url.strip().partition(":")[0].lower()
    if scheme == "data":
        return "data_url"
    if scheme not in ("http", "https"):
        return "scheme"
    try:
        return None if URL(url.strip()).host and canonical_url(url) else "bad_url"
    except ValueError:
        return "bad_url"


def _merge(rows: list[Row]) -> list[Row]:
    """One row per url_key: texts in order of page and position (page titles last), equal ones once; the first opt-out
    holds, wherever it stood."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["url_key"], []).append(row)
    return [_join(sorted(group, key=lambda row: (row["page"] or "", row["position"]))) for group in groups.values()]


def _join(group: list[Row]) -> Row:
    texts: dict[str, Any] = {}
    for entry in sorted((e for row in group for e in row["texts"]), key=lambda entry: entry["kind"] == "title"):
        texts.setdefault(entry["text"], entry)
    facts = {
        name: next((row[name] for row in group if row[name] is not None), None)
        for name in ("license", "opt_out", "source_uid", "page")
    }
    first = {name: value for name, value in group[0].items() if name != "position"}
    return first | facts | {"texts": list(texts.values())}


def _earlier_keys(workspace: Workspace, name: str, earlier: list[str]) -> Iterator[tuple[str, set[str], set[str]]]:
    """Of each earlier increment: its name, its keys, and those of them that failed for a passing cause."""
    for increment in earlier:
        keys = set(workspace.store.read_table(part(name, increment), ["url_key"])["url_key"].to_pylist())
        failed: set[str] = set()
        for path in workspace.store.files(f"ledger/{name}/{increment}", ".parquet"):
            ledger = workspace.store.read_table(path, ["url_key", "status"])
            pairs = zip(ledger["url_key"].to_pylist(), ledger["status"].to_pylist(), strict=True)
            failed |= {key for key, status in pairs if status == "transient"}
        yield increment, keys, failed


def _without_earlier(
    workspace: Workspace, name: str, earlier: list[str], merged: list[Row], dropped: Counter[str]
) -> list[Row]:
    waiting: set[str] = set()  # in an earlier increment, and not to come again
    tries: Counter[str] = Counter()
    for _, keys, failed in _earlier_keys(workspace, name, earlier):
        waiting = (waiting | keys) - failed
        tries.update(failed)
    dead = workspace.tombstones()
    kept = []
    for row in merged:
        key = row["url_key"]
        reasons = {
            "forgotten": refused(dead, key, row["url"]),
            "earlier": key in waiting,
            "gave_up": tries[key] >= MAX_TRIES,
        }
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
    return kept


def _bury_opted_out(workspace: Workspace, name: str, earlier: list[str], merged: list[Row]) -> int:
    """An opt-out that came after the image was taken acts as `forget`: a tombstone takes effect at once."""
    opted = {row["url_key"] for row in merged if row["opt_out"] is not None}
    if not opted or not earlier:
        return 0
    had: set[str] = set()
    for increment in earlier:
        table = workspace.store.read_table(part(name, increment), ["url_key", "opt_out"])
        columns = (table[column].to_pylist() for column in ("url_key", "opt_out"))
        had |= {key for key, reason in zip(*columns, strict=True) if reason is None}
    late = sorted((opted & had) - workspace.tombstones()["url_key"])
    if late:
        workspace.bury("url_key", late, OPTED_OUT)
    return len(late)
