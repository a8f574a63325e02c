"""The selection: which pairs are kept, and with which texts. The only place that judges.

Rules commute, so each is asked of all rows at once; a pair's `dropped_by` is the first in the recipe's order. The
order of steps is: forgotten, held_out, held_out_twin, the rules, texts, then `one_per` among the survivors.
Thresholds found by a quantile or by canaries are pinned before the first table is written, and reused by later ones;
`recalibrate` finds them anew and, where they moved, starts another folder, because published tables never change.
Trusted pairs are dropped by no rules but those with `quarantine`; a held-out one is never kept, but its look-alikes
go as those of any trusted pair do. A trusted pair that shares its bytes, or a group of a `one_per`, with a held-out one
isn't kept either (held_out_twin): what evaluates must not be trained on under another name.
Cost: a million rows take seconds; the memory is that of the columns that rules read.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.columns import Frame, as_bool, load_frame, read_columns
from filters.funnel import fetch_counts, rule_counts, total
from filters.rules import nulls, numbers
from filters.texts import choose_texts, column_names
from filters.thresholds import Thresholds, current, drops, found, pin, pinned, told
from pairs.fingerprint import fingerprint
from pairs.rules import Rule, TextsSpec
from pairs.schemas import SELECTION
from pairs.shard import ShardRef
from pairs.store import Store
from pairs.workspace import Workspace

FORGOTTEN, HELD_OUT, HELD_OUT_TWIN, TEXTS = "forgotten", "held_out", "held_out_twin", "texts"
BEFORE_RULES = (FORGOTTEN, HELD_OUT, HELD_OUT_TWIN)
SHA256 = "pairs.sha256"
VERSION = 4  # raise it when the same columns would give other verdicts
Shards = Mapping[str, Sequence[ShardRef]]


@dataclass(frozen=True)
class SelectionResult:
    """A finished selection. `folder` is `selections/<name>-<fingerprint>`; `written` counts the tables of this call."""

    folder: str
    manifest: dict[str, Any]
    funnel: dict[str, Any]
    written: int

    @property
    def kept(self) -> int:
        return int(self.funnel["total"]["kept"])


def rule_columns(keep: Sequence[Rule]) -> list[str]:
    """The columns that the rules read, each once."""
    return list(dict.fromkeys(name for r in keep for name in (r.column, r.one_per, r.best) if name is not None))


def steps(keep: Sequence[Rule]) -> list[str]:
    """The names of what can drop a pair, in the funnel's order."""
    rules = [rule.name for rule in keep if rule.one_per is None]
    return list(dict.fromkeys([*BEFORE_RULES, *rules, TEXTS, *(r.name for r in keep if r.one_per is not None)]))


def select(
    store: Store,
    name: str,
    keep: Sequence[Rule],
    texts: TextsSpec,
    shards: Shards,
    scores: Mapping[str, str],
    trusted: Collection[str],
    *,
    recalibrate: bool = False,
    canaries: Sequence[ShardRef] = (),
) -> SelectionResult:
    """Makes the selection's missing tables, its funnel and its manifest.

    `shards` are the complete pair shards of each source; `scores` maps each filter and reducer to the folder of its
    tables (`scores/<name>-<fingerprint>`); `trusted` names the trusted sources. The fingerprint covers the rules, with
    the content of lists, the text choice, the scores that they read and the sources' fetch fingerprints, not the
    increments. `canaries` are read by `target_recall` and `false_drops` alone.
    """
    identity = _identity(name, keep, texts, shards, scores, trusted)
    base = f"selections/{name}-{fingerprint(identity)}"
    folder = current(store, base)
    asked = [case and case.target_recall for r in keep for case in r.cases().values()]
    canaries = canaries if any(asked) or texts.false_drops is not None else []
    inputs = _inputs(store, shards, canaries)
    if not recalibrate and (done := _finished(store, folder, inputs)):
        return done
    twins = [SHA256] if set(trusted) & set(shards) else []  # only a held-out pair has twins to look for
    frame = load_frame(store, shards, dict.fromkeys([*rule_columns(keep), *twins]), scores, trusted)
    now = found(store, keep, texts, frame, scores, canaries, () if recalibrate else pinned(store, folder))
    folder, pins = pin(store, base, folder, now, recalibrate)
    there = set(store.files(folder, ".parquet"))
    old = {r: store.read_table(r.beside(folder)).cast(SELECTION) for _, r in frame.shards if r.beside(folder) in there}
    dropped = drops(keep, frame.table, pins, frame.source)
    texts = texts.at({name: vars(threshold) for name, threshold in pins.items()})
    tables = _verdicts(keep, frame, dropped, _texts(store, texts, frame, old, scores), old)
    for ref, table in tables.items():
        if ref not in old:
            store.write_table(ref.beside(folder), table)
    funnel = _funnel(store, keep, shards, frame, list(tables.values()))
    manifest = identity | _facts(folder, pins, now, frame, funnel) | {"inputs": inputs}
    store.write(f"{folder}/funnel.json", json.dumps(funnel, indent=1))
    store.write(f"{folder}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True))
    return SelectionResult(folder, manifest, funnel, len(tables) - len(old))


def _identity(
    name: str,
    keep: Sequence[Rule],
    texts: TextsSpec,
    shards: Shards,
    scores: Mapping[str, str],
    trusted: Collection[str],
) -> dict[str, Any]:
    read = {column.partition(".")[0] for column in [*rule_columns(keep), *column_names(texts)]}
    return {
        "version": VERSION,
        "name": name,
        "keep": [rule.identity for rule in keep],
        "texts": texts.model_dump(by_alias=True, exclude={"false_drops"} if texts.false_drops is None else set()),
        "scores": {maker: folder for maker, folder in sorted(scores.items()) if maker in read},
        "sources": {source: sorted({ref.group for ref in refs}) for source, refs in sorted(shards.items())},
        "trusted": sorted(set(trusted) & set(shards)),
    }


def _inputs(store: Store, shards: Shards, canaries: Sequence[ShardRef]) -> str:
    """A fingerprint of everything that a finished selection was made from and that may have grown since."""
    groups = sorted({ref.group for refs in shards.values() for ref in refs})
    ledgers = {group: store.files(f"ledger/{group}", ".parquet") for group in groups}
    candidates = {source: store.files(f"candidates/{source}", ".parquet") for source in shards}
    dead = {kind: sorted(ids) for kind, ids in Workspace(store).tombstones().items()}
    tables = sorted(ref.table for refs in shards.values() for ref in refs)
    facts = {"shards": tables, "ledgers": ledgers, "candidates": candidates, "tombstones": dead}
    return fingerprint(facts | ({"canaries": [ref.folder for ref in canaries]} if canaries else {}))


def _finished(store: Store, folder: str, inputs: str) -> SelectionResult | None:
    if not store.has(f"{folder}/manifest.json"):
        return None
    manifest = json.loads(store.read(f"{folder}/manifest.json"))
    if manifest["inputs"] != inputs:
        return None
    return SelectionResult(folder, manifest, json.loads(store.read(f"{folder}/funnel.json")), 0)


def _texts(
    store: Store, spec: TextsSpec, frame: Frame, old: Mapping[ShardRef, pa.Table], scores: Mapping[str, str]
) -> pa.Array:
    """The kept texts of every row; null in shards that were judged before and where a pair is forgotten."""
    kind = SELECTION.field("texts").type
    lists = [pa.array([], kind)]
    for place, (_, ref) in enumerate(frame.shards):
        rows = frame.rows(place)
        if ref in old:
            lists.append(pa.nulls(rows.stop - rows.start, kind))
        else:
            table = read_columns(store, ref, list(dict.fromkeys(column_names(spec))), scores, ("uid",))
            lists.append(choose_texts(spec, table, frame.trusted[rows]).cast(kind))
    joined = pa.concat_arrays(lists)
    return joined.take(pa.array(np.arange(len(joined)), mask=~frame.alive))


def _verdicts(
    keep: Sequence[Rule],
    frame: Frame,
    drops: Mapping[str, np.ndarray],
    texts: pa.Array,
    old: Mapping[ShardRef, pa.Table],
) -> dict[ShardRef, pa.Table]:
    """The verdict on every row, by shard; shards that were judged before keep theirs."""
    judged = np.repeat([ref in old for _, ref in frame.shards], np.diff(frame.starts)).astype(bool)
    incumbent = np.zeros(len(frame.alive), bool)
    for place, (_, ref) in enumerate(frame.shards):
        if ref in old:
            incumbent[frame.rows(place)] = as_bool(old[ref]["kept"]) & frame.alive[frame.rows(place)]
    free = frame.alive & ~frame.trusted
    bare = ~as_bool(pc.greater(pc.list_value_length(texts), 0))
    masks = {FORGOTTEN: ~frame.alive, HELD_OUT: frame.held_out & frame.alive}
    masks[HELD_OUT_TWIN] = _held_out_twins(keep, frame)
    unsafe = {rule.name for rule in keep if rule.quarantine}  # nobody vouches for what a safety score flags
    judges = {name: mask & (frame.alive if name in unsafe else free) for name, mask in drops.items()}
    masks |= judges | {TEXTS: bare & frame.alive}
    survives = ~judged & ~np.logical_or.reduce(list(masks.values()))
    for rule in (rule for rule in keep if rule.one_per is not None):
        masks[rule.name] = _others(rule, frame, survives, incumbent)
        survives &= ~masks[rule.name]
    table = _as_table(steps(keep), frame, masks, texts)
    found = {}
    for place, (_, ref) in enumerate(frame.shards):
        rows = frame.rows(place)
        found[ref] = old.get(ref, table.slice(rows.start, rows.stop - rows.start))
    return found


def _held_out_twins(keep: Sequence[Rule], frame: Frame) -> np.ndarray:
    """Trusted pairs that share their bytes, or a group of a `one_per`, with a held-out pair."""
    return _alike(keep, frame, frame.held_out & frame.alive) & frame.trusted & frame.alive & ~frame.held_out


def _alike(keep: Sequence[Rule], frame: Frame, of: np.ndarray) -> np.ndarray:
    """Rows that share their bytes, or a group of a `one_per`, with a row in `of`."""
    found = np.zeros(len(of), bool)
    for name in dict.fromkeys([SHA256, *(r.one_per for r in keep if r.one_per is not None)]) if of.any() else ():
        column = frame.table[name]
        theirs = pc.drop_null(column.filter(pa.array(of))).cast(pa.string())
        found |= as_bool(pc.is_in(column.cast(pa.string()), theirs.combine_chunks()))
    return found


def look_alikes(
    store: Store, keep: Sequence[Rule], shards: Shards, scores: Mapping[str, str], uids: Collection[str]
) -> list[str]:
    """`uids`, and those of all living pairs that share their bytes, or a group of a `one_per`, with one of them."""
    names = [SHA256, *(rule.one_per for rule in keep if rule.one_per is not None)]
    frame = load_frame(store, shards, names, scores, [])
    of = as_bool(pc.is_in(frame.table["uid"], pa.array(list(uids), pa.string())))
    return sorted({*uids, *frame.table["uid"].filter(pa.array(_alike(keep, frame, of) & frame.alive)).to_pylist()})


def _others(rule: Rule, frame: Frame, survives: np.ndarray, incumbent: np.ndarray) -> np.ndarray:
    """What `one_per` drops: all of a group but its best survivor; everyone where a trusted pair or an incumbent is.
    A null group is no group: like any null it doesn't pass."""
    column = frame.table[rule.one_per].combine_chunks().dictionary_encode()
    codes = pc.fill_null(column.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    closed = np.zeros(len(column.dictionary) + 1, bool)  # the last place is null's, which -1 points to
    closed[codes[(frame.trusted & frame.alive) | incumbent]] = True
    closed[-1] = True
    competing = survives & ~frame.trusted
    dropped = competing & closed[codes]
    rows = np.flatnonzero(competing & ~dropped)
    rows = rows[np.bincount(codes[rows], minlength=len(closed))[codes[rows]] > 1]
    value = numbers(frame.table[rule.best], rule.best) if rule.best else np.zeros(len(codes))
    uids = np.argsort(np.argsort(frame.table["uid"].take(pa.array(rows)).to_numpy().astype(str)))
    order = rows[np.lexsort((uids, -np.nan_to_num(value[rows], nan=-np.inf), codes[rows]))]
    dropped[order[1:][np.diff(codes[order]) == 0]] = True
    return dropped


def _as_table(names: Sequence[str], frame: Frame, masks: Mapping[str, np.ndarray], texts: pa.Array) -> pa.Table:
    drop_NR = np.stack([masks[name] for name in names], axis=1)
    kept = ~drop_NR.any(axis=1)
    first = pa.array(np.where(kept, 0, drop_NR.argmax(axis=1)), mask=kept)
    words = pa.array(list(names), pa.string())
    offsets = pa.array(np.concatenate([[0], np.cumsum(drop_NR.sum(axis=1))]), pa.int32())
    would = pa.ListArray.from_arrays(offsets, words.take(pa.array(np.nonzero(drop_NR)[1])))
    columns = [frame.table["uid"], pa.array(kept), words.take(first), would, texts]
    return pa.table(dict(zip(SELECTION.names, columns, strict=True))).cast(SELECTION).combine_chunks()


def _funnel(
    store: Store, keep: Sequence[Rule], shards: Shards, frame: Frame, tables: Sequence[pa.Table]
) -> dict[str, Any]:
    """The funnel per source and in total. A pair that was forgotten after it was judged counts as forgotten."""
    judged = ["dropped_by", "would_drop"]
    table = pa.concat_tables([SELECTION.empty_table().select(judged), *(t.select(judged) for t in tables)])
    table = table.set_column(0, "dropped_by", pc.if_else(pa.array(~frame.alive), FORGOTTEN, table["dropped_by"]))
    empty = {r.name: nulls(frame.table[r.column or r.one_per]) & frame.alive for r in keep}
    sources = {}
    for source, refs in shards.items():
        rows = frame.source == source
        increments = sorted({ref.increment for ref in refs})
        counts = fetch_counts(store, source, sorted({ref.group for ref in refs}), increments, int(rows.sum()))
        sources[source] = counts | rule_counts(steps(keep), table, empty, frame.trusted, rows)
    return {"sources": sources, "total": total(sources)}


def _facts(folder: str, pins: Thresholds, now: Thresholds, frame: Frame, funnel: Mapping[str, Any]) -> dict[str, Any]:
    increments: dict[str, list[str]] = {}
    for source, ref in frame.shards:
        if ref.increment not in increments.setdefault(source, []):
            increments[source].append(ref.increment)
    counts = {key: funnel["total"][key] for key in ("candidates", "pairs", "trusted", "kept")}
    return {"folder": folder, "thresholds": told(pins, now), "increments": increments, "counts": counts}
