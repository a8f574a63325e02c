"""Cuts the next increment of a source: what it yields now, merged by `url_key`, less what earlier increments have.

The cut comes after the crawl has ended and sorts by `url_key`, and merged texts are ordered by where they stood,
so that crawl order never reaches the bytes. Every row that isn't taken is counted by reason. What failed for a passing
cause and has waited joins the new one, also where the source no longer has it. `pipelines/merge.py` bounds the memory.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.compute import Engine
from pairs.errors import PairmillError
from pairs.increments import following, holding
from pairs.recipe import FetchSpec, SourceSpec
from pairs.store import table_metadata
from pairs.workspace import Dead, Workspace, refused
from pipelines.fetch.ledger import Passing, due, tries
from pipelines.merge import Merge, Merged, Sets, clean, living, merge, write_groups
from pipelines.sources import Context, Progress, Row, load_source

MAX_TRIES = 5  # increments in which a candidate may fail for a passing cause
OPTED_OUT = "opt_out"
FREE = frozenset({"delay_s", "per_host", "max_pages", "max_depth", "sitemaps"})  # say how far and how fast, not what


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
    workspace: Workspace,
    name: str,
    spec: SourceSpec,
    fetch_spec: FetchSpec,
    progress: Progress,
    engine: Engine = "inline",
    workers: int = 1,
) -> CutCounts:
    """Makes the next increment of the source `name`; call it under the workspace's lock. Raises PairmillError when the
    source is empty, can't be reached or is another than that of its increments, with nothing written."""
    check_settings(workspace, name, spec)
    earlier = workspace.increments(name)
    for interrupted in earlier:
        _bury_late(workspace, name, interrupted)
    increment = next_increment(workspace, name)
    source = load_source(name, spec)
    context = Context(workspace, name, increment, tuple(spec.allow), fetch_spec, progress, engine, workers)
    how = Merge(workspace.store, f"crawl/{name}/{increment}/merge", _judge, engine, workers)
    bad: Counter[str] = Counter()
    dead = workspace.tombstones()
    fresh = living((row for r in source.candidates(context) if (row := clean(r, bad)) is not None), dead, bad)
    rows = _with_due(fresh, workspace, name, earlier, fetch_spec, dead)
    merged = merge(rows, _earlier_keys(workspace, name, earlier, fetch_spec), dead["url_key"], how)
    context.dropped.update(bad)
    found = merged.outcome.taken + sum(count for reason, count in context.dropped.items() if reason != "text_cut")
    if not found:
        raise PairmillError(
            expected=f"images in the source {name!r}", found="none", remedy="check its settings and what it holds"
        )
    context.dropped.update(merged.outcome.dropped)
    counts = _counts(increment if merged.outcome.kept else None, found, merged, context)
    workspace.store.write(_late(name, increment), json.dumps(merged.outcome.late))
    if merged.outcome.kept:
        facts = {"counts": json.dumps(asdict(counts)), "settings": _settings(name, spec)}
        write_groups(workspace.store, part(name, increment), merged.tables(), facts)
    _end(workspace, name, increment)
    return counts


def _late(name: str, increment: str) -> str:
    """Where a cut notes what has opted out of earlier increments: tombstones that are written before the table would
    change what is counted when it is made again after a kill."""
    return f"crawl/{name}/{increment}/late.json"


def _bury_late(workspace: Workspace, name: str, increment: str) -> None:
    if workspace.store.has(note := _late(name, increment)):
        workspace.bury("url_key", json.loads(workspace.store.read(note)), OPTED_OUT)


def _end(workspace: Workspace, name: str, increment: str) -> None:
    """What follows a cut: opt-outs act, and the crawl's pages have done their work."""
    _bury_late(workspace, name, increment)
    workspace.store.delete(f"crawl/{name}", recursive=True)


def next_increment(workspace: Workspace, name: str) -> str:
    """What the next increment of a source is called."""
    return following(workspace.increments(name))


def finished_cut(workspace: Workspace, name: str, increment: str) -> CutCounts | None:
    """What was counted when `increment` was cut, None where it isn't. Ends what a kill after the cut left to do."""
    (holder,) = holding(there := workspace.increments(name), [increment])
    if holder not in there:
        return None
    _end(workspace, name, increment)
    told = _metadata(workspace, name, holder)
    return CutCounts(**json.loads(told["counts"] if holder == increment else json.loads(told["members"])[increment]))


def check_settings(workspace: Workspace, name: str, spec: SourceSpec) -> None:
    """Refuses a source that was changed since its increments were cut: they would pass for what it is now."""
    now = _settings(name, spec)
    for increment in workspace.increments(name):
        before = _metadata(workspace, name, increment).get("settings", now)
        old, new = json.loads(before), json.loads(now)
        if changed := [key for key in sorted(old | new) if old.get(key) != new.get(key)]:
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


def _counts(increment: str | None, found: int, merged: Merged, context: Context) -> CutCounts:
    texts, pages = context.dropped.pop("text_cut", 0), context.pages.pop("cut", 0)
    dropped, fates = _plain(context.dropped), _plain(context.pages)
    out = merged.outcome
    assert found == out.kept + sum(dropped.values()), (found, out.kept, dropped)
    return CutCounts(increment, found, out.kept, out.opted, len(out.late), texts, pages, dropped, fates)


def _plain(counts: Counter[str]) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}


def _with_due(
    rows: Iterator[Row], workspace: Workspace, name: str, earlier: list[str], spec: FetchSpec, dead: Dead
) -> Iterator[Row]:
    """The source's rows, then those of earlier increments that may be tried again and the source has no longer."""
    again = _due(workspace, name, earlier, spec)
    for row in rows:
        again.discard(row["url_key"])
        yield row
    for increment in reversed(earlier) if again else ():
        table = workspace.store.read_table(part(name, increment))
        left = table.filter(pc.is_in(table["url_key"], pa.array(sorted(again), pa.string())))
        for row in left.replace_schema_metadata(None).to_pylist():
            again.discard(row["url_key"])
            if row["url"] and not refused(dead, row["url_key"], row["url"]):
                yield row | {"position": 0}


def _due(workspace: Workspace, name: str, earlier: list[str], spec: FetchSpec) -> set[str]:
    """The keys that failed for a passing cause wherever they were tried, not too often and long enough ago."""
    times: dict[str, list[Passing]] = {}
    for increment in earlier:
        all_ = workspace.store.read_table(part(name, increment), ["url_key"])["url_key"]
        for keys, failed in tries(workspace.store, name, increment, all_, spec):
            again = keys.filter(pc.is_in(keys, pa.array(sorted(times), pa.string()))).to_pylist()
            for key in set(again) - failed.keys():
                del times[key]
            for key, at in failed.items():
                times.setdefault(key, []).append(at)
    return {key for key, at in times.items() if len(at) < MAX_TRIES and due(at, spec)}


def _earlier_keys(workspace: Workspace, name: str, earlier: list[str], spec: FetchSpec) -> Iterator[Sets]:
    """Of each earlier cut: its keys, those of them that failed for a passing cause, those that hadn't opted out,
    and (with the last one) those that failed and haven't waited long enough."""
    times: dict[str, list[Passing]] = {}
    for increment in earlier:
        table = workspace.store.read_table(part(name, increment), ["url_key", "opt_out"])
        open_ = set(table.filter(pc.is_null(table["opt_out"]))["url_key"].to_pylist())
        told = tries(workspace.store, name, increment, table["url_key"], spec)
        for left, (tried, failed) in zip(reversed(range(len(told))), told, strict=True):
            for key, at in failed.items():
                times.setdefault(key, []).append(at)
            last = increment == earlier[-1] and not left
            rest = {key for key, at in times.items() if not due(at, spec)} if last else set[str]()
            keys = set(tried.to_pylist())
            yield keys, set(failed), open_ & keys, rest


def _judge(merged: list[Row], earlier: list[Sets], dead: frozenset[str]) -> tuple[list[Row], Counter[str], list[str]]:
    """The rows that stay, why others don't, and the keys that opted out after the image was taken: that acts as
    `forget`, a tombstone takes effect at once."""
    opted = {row["url_key"] for row in merged if row["opt_out"] is not None}
    late = sorted(opted & set[str]().union(*(open_ for _, _, open_, _ in earlier)) - dead)
    dropped: Counter[str] = Counter()
    return _without_earlier(earlier, merged, dead.union(late), dropped), dropped, late


def _without_earlier(earlier: list[Sets], merged: list[Row], dead: frozenset[str], dropped: Counter[str]) -> list[Row]:
    """What is new, and what failed for a passing cause and has waited long enough. The rest is counted: `later` comes
    again, `gave_up` doesn't."""
    settled: set[str] = set()  # in an earlier increment, and not to come again
    resting: set[str] = set()
    tries: Counter[str] = Counter()
    for keys, failed, _, rest in earlier:
        settled = (settled | keys) - failed
        resting |= rest
        tries.update(failed)
    kept = []
    for row in merged:
        key = row["url_key"]
        reasons = {"forgotten": key in dead, "earlier": key in settled, "gave_up": tries[key] >= MAX_TRIES}
        reasons["later"] = key in resting
        reason = next((reason for reason, holds in reasons.items() if holds), None)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
    return kept
