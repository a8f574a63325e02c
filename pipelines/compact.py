"""`pairmill compact`: which increments are merged, and why the others are left as they are.

A run of adjacent increments of a source is merged where each is small, fetched and scored to its end, where the same
settings, filters and selections have seen all of them, and where no run that may still be gone on with is pinned to
some of them only: so nothing is fetched, scored or trained again. `joining.py` does the merging.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from pairs.errors import PairmillError
from pairs.increments import joined, span
from pairs.shard import ShardRef, list_shards
from pairs.store import Store
from pairs.workspace import Workspace
from pipelines import takedown
from pipelines.candidates import part
from pipelines.joining import DERIVED, Merge, join

Facts = dict[str, Any]


@dataclass
class State:
    """Of one increment: its `pairs` (in the group that has most), what has `seen` all of them, and why it must be left
    alone, if it must."""

    name: str
    pairs: int = 0
    candidates: int = 0
    shards: int = 0
    seen: set[str] = field(default_factory=set)
    why: str = ""
    alone: str = "no small neighbour"


def compact(workspace: Workspace, source: str | None, below: int | None, dry_run: bool) -> Facts:
    """Merges what can be merged of `source` (all, where None); small is below `below` pairs, by default less than fills
    a shard. With `dry_run` it only tells. Raises PairmillError where another writer is at work."""
    with contextlib.nullcontext() if dry_run else workspace.lock():
        if not dry_run:
            takedown.finish(workspace)
        sources = workspace.store.folders("candidates")
        if source and source not in sources:
            raise PairmillError(
                expected=f"a source of {workspace.store.root}: {', '.join(sources) or 'none yet'}",
                found=source,
                remedy="correct --source",
            )
        merged, left = [], []
        for name in [source] if source else sources:
            plans, stays = plan(workspace, name, below)
            for one in plans if not dry_run else ():
                join(workspace, one)
            merged += [one.told for one in plans]
            left += stays
        return {"dry_run": dry_run, "merged": merged, "left": left}


def tell(facts: Facts, as_json: bool) -> None:
    """Prints what `compact` did, or with a dry run would do."""
    if as_json:
        print(json.dumps(facts))
        return
    for one in facts["merged"]:
        verb = "would merge" if facts["dry_run"] else "merged"
        held = f"{one['pairs']} pairs in {one['shards']} shards"
        print(f"{verb} {one['source']} {', '.join(one['members'])} ({held}) into {one['increment']}")
    for one in facts["left"]:
        print(f"left {one['source']} {one['increment']} ({one['pairs']} pairs): {one['why']}")
    if not facts["merged"]:
        print("nothing to merge")


def plan(workspace: Workspace, source: str, below: int | None) -> tuple[list[Merge], list[Facts]]:
    """The merges of a source, and the increments that stay with the reason."""
    sizes = _shard_sizes(workspace.store)
    groups = sorted({g for kind in ("ledger", "pairs") for g in workspace.store.folders(kind) if _of(g) == source})
    states = [_state(workspace.store, source, name, groups, sizes) for name in workspace.increments(source)]
    limit = below or max((sizes[g.rpartition("-")[2]] for g in groups if g.rpartition("-")[2] in sizes), default=0)
    ends = _pinned(workspace.store, source, states)
    for state in states:
        if not state.why and state.pairs >= limit:
            state.why = f"large: {limit} pairs and more stay as they are"
    runs: list[list[State]] = [[]]
    for state in states:
        last = runs[-1][-1] if runs[-1] else None
        told = last and _apart(last, state, ends)
        if told or state.why:
            runs.append([])
        if last and told:
            last.alone = state.alone = told
        runs[-1] += [] if state.why else [state]
    runs = [run for run in runs if len(run) > 1]
    stay = [state for state in states if not any(state in run for run in runs)]
    left = [{"source": source, "increment": s.name, "pairs": s.pairs, "why": s.why or s.alone} for s in stay]
    return [_merge(source, run, sizes) for run in runs], left


def _apart(one: State, other: State, ends: Mapping[int, str]) -> str:
    """Why two neighbours can't become one, or an empty string."""
    if end := ends.get(span(one.name)[1]):
        return f"{end} is pinned up to {one.name}"
    lacks = sorted(one.seen ^ other.seen)
    return f"{lacks[0]} is of {one.name if lacks[0] in one.seen else other.name} alone" if lacks else ""


def _of(group: str) -> str:
    return group.rpartition("-")[0]


def _merge(source: str, run: list[State], sizes: Mapping[str, int]) -> Merge:
    names, groups = [state.name for state in run], {seen.rpartition("/")[2] for seen in run[0].seen}
    mine = {group: sizes[group.rpartition("-")[2]] for group in sorted(groups)}
    told = {"source": source, "increment": joined(names), "members": names, "pairs": sum(s.pairs for s in run)}
    return Merge(source, joined(names), names, mine, told | {"shards": sum(state.shards for state in run)})


def _shard_sizes(store: Store) -> dict[str, int]:
    """How many candidates make a shard, by fetch fingerprint, as the runs tell that fetched."""
    told = (json.loads(store.read(path)) for path in store.files("runs", "/lineage.json"))
    return {run["fetch"]: int(run["recipe"]["fetch"]["shard_pairs"]) for run in told}


def _state(store: Store, source: str, name: str, groups: list[str], sizes: Mapping[str, int]) -> State:
    state = State(name, candidates=store.read_table(part(source, name), ["url_key"]).num_rows)
    for group in groups:
        refs = list_shards(store, f"pairs/{group}/{name}")
        parts = store.files(f"ledger/{group}/{name}", ".parquet")
        if not refs and not parts:
            continue
        size = sizes.get(group.rpartition("-")[2])
        blocks = list(range(-(-state.candidates // size))) if size else []
        if [ref.index for ref in refs] != blocks or len(parts) != len(blocks):
            state.why = f"its fetch into {group} isn't finished: run the recipe again"
            return state
        state.shards += len(refs)
        state.pairs = max(state.pairs, sum(store.read_table(ref.table, ["uid"]).num_rows for ref in refs))
        state.seen |= {f"pairs/{group}", *_seen(store, state, group, refs)}
    state.why = state.why or ("" if state.seen else "it isn't fetched: run the recipe")
    return state


def _seen(store: Store, state: State, group: str, refs: list[ShardRef]) -> Iterator[str]:
    """The folders that mirror all of an increment's shards; one that mirrors some is an interrupted run's."""
    for folder in (f"{kind}/{name}" for kind in DERIVED for name in store.folders(kind)):
        there = set(store.files(f"{folder}/{group}/{state.name}", ".parquet"))
        wanted = {ref.beside(folder) for ref in refs}
        if there and there != wanted:
            state.why = f"{folder} has seen part of it: run the recipe again"
        if there == wanted:
            yield f"{folder}/{group}"


def _pinned(store: Store, source: str, states: list[State]) -> dict[int, str]:
    """The last cut that each latest run of a recipe is pinned to, with the run; an older run of a recipe is never gone
    on with. What an unfinished one is at work on is left alone."""
    latest = {run.rpartition("-")[0]: f"runs/{run}" for run in store.folders("runs")}
    ends: dict[int, str] = {}
    for run in latest.values():
        recipe = yaml.safe_load(store.read(f"{run}/recipe.yaml"))
        path = f"{run}/lineage.json"
        names = json.loads(store.read(path))["increments"].get(source, []) if store.has(path) else []
        if names:
            ends[span(names[-1])[1]] = run
        if source in recipe["sources"] and not store.has(f"{run}/report.html"):
            for state in (s for s in states if not names or span(s.name)[1] <= span(names[-1])[1]):
                state.why = f"{run} isn't finished: run its recipe.yaml again, or delete that folder to give it up"
    return ends
