"""How good the filters are, told by the canaries: recall, false drops on the twins, and ROC-AUC, with intervals.

The rules are asked with the thresholds that the selection pinned (overrides of a source left aside, and lists of uids,
which canaries aren't on), and only the reporting half is counted. Reducers are queried, each once for all canaries, so
a canary changes no real row, and not again where only thresholds move; how each defect is asked stands in
`filters.defects`. A duplicate's canary is caught where
a group is found for it, since its original is there; any other row where a pair of its group is kept. Precision depends
on how common a defect is, so it stands beside a prevalence. Canaries of pairs that nobody vouched for are corrected for
their noise (`filters.canary_figures`).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.compute import Engine
from filters.base import Reducer
from filters.canaries import FACTS, facts, reporting
from filters.canary_figures import noise, precision, roc_auc, roc_points, verdict_auc, wilson, without_noise
from filters.columns import as_bool, load_frame
from filters.defects import DEFECTS
from filters.reduce import asked
from filters.rules import Threshold, numbers
from filters.selection import TEXTS, rule_columns
from filters.texts import SYNTHETIC, choose_texts, column_names
from filters.thresholds import drops
from pairs.rules import Rule, TextsSpec
from pairs.shard import ShardRef
from pairs.store import Store

SELECTION_AS_A_WHOLE = "selection"
TELLING = 0.1  # an AUC this far from 0.5 gets a curve
NUMBERS = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_float32, pa.types.is_float64)
Masks = dict[str, np.ndarray]


@dataclass(frozen=True)
class Judged:
    """The real pairs that canaries are asked against, and the rules that judged them."""

    store: Store
    shards: Mapping[str, Sequence[ShardRef]]
    trusted: Collection[str]
    scores: Mapping[str, str]  # folders of filters and reducers
    reducers: Mapping[str, Reducer]
    keep: Sequence[Rule]
    texts: TextsSpec
    selection: str  # folder
    thresholds: Mapping[str, Mapping[str, Any]]  # the selection's manifest's
    engine: Engine = "inline"  # of the reducers' queries
    workers: int = 1


def report(canaries: Sequence[ShardRef], real: Judged, prevalence: float = 0.1) -> dict[str, Any]:
    """Per defect: `canaries` and `twins` counted, `rules` (name, recall, false_drops, auc; the last one is the
    selection as a whole), `auc` of each score with its curve, recall by `kinds`, `precision` at `prevalence`, and
    without trusted pairs the `noise` of which the figures are freed.

    A figure is {value, low, high, n}. Empty `defects` where there are no canaries.
    """
    facts_N = pa.concat_tables([FACTS.empty_table(), *(facts(real.store, ref) for ref in canaries)])
    caught, columns = _asked(real, canaries, facts_N) if facts_N.num_rows else ({}, {})
    defects = {}
    for defect in facts_N["defect"].unique().to_pylist():
        mine = as_bool(pc.equal(facts_N["defect"], defect))
        canary, twin = (half & mine for half in reporting(facts_N))
        defects[defect] = _figures(caught, columns, canary, twin, prevalence, clean=bool(real.trusted))
        kinds, whole = np.array(facts_N["kind"].to_pylist(), object), caught[SELECTION_AS_A_WHOLE]
        parts = {kind: canary & (kinds == kind) for kind in sorted(set(kinds[canary]))}
        defects[defect]["kinds"] = [{"kind": k, "recall": wilson(whole[m].sum(), m.sum())} for k, m in parts.items()]
    return {"half": "report", "prevalence": prevalence, "trusted": bool(real.trusted), "defects": defects}


def _figures(
    caught: Masks, columns: Masks, canary: np.ndarray, twin: np.ndarray, prevalence: float, clean: bool
) -> dict[str, Any]:
    scores = {name: (values[canary], values[twin]) for name, values in columns.items()}
    dirt = None if clean else noise(scores)
    rules: list[dict[str, Any]] = []
    for name, mask in caught.items():
        recall, wrong = wilson(mask[canary].sum(), canary.sum()), wilson(mask[twin].sum(), twin.sum())
        wrong = wrong if clean else without_noise(wrong, dirt, recall)
        auc = verdict_auc(recall, wrong) | ({"bound": wrong["bound"]} if "bound" in wrong else {})
        rules.append({"rule": name, "recall": recall, "false_drops": wrong, "auc": auc})
    told = []
    for name, (bad, good) in scores.items():
        auc = roc_auc(bad, good)
        telling = auc["value"] is not None and abs(auc["value"] - 0.5) > TELLING
        auc = auc if clean else without_noise(auc, dirt)
        told.append({"column": name, "auc": auc} | ({"curve": roc_points(bad, good)} if telling else {}))
    facts = {"canaries": int(canary.sum()), "twins": int(twin.sum()), "rules": rules, "auc": told}
    whole = precision(rules[-1]["recall"], rules[-1]["false_drops"], prevalence)
    return facts | {"precision": whole} | ({} if clean else {"noise": dirt})


def _asked(real: Judged, refs: Sequence[ShardRef], told: pa.Table) -> tuple[Masks, Masks]:
    """For the rows of all canary shards: which each rule would drop, and the scores."""
    shards = {"canaries": refs}
    keep = [rule for rule in real.keep if rule.in_list is None]
    scored = {name: path for name, path in real.scores.items() if real.store.has(refs[0].beside(path))}
    found = _numeric(real.store, refs[0], scored)
    read = [c for c in [*rule_columns(keep), *column_names(real.texts)] if c.partition(".")[0] not in real.reducers]
    table = load_frame(real.store, shards, [*read, *found], scored, []).table
    of = [DEFECTS[name] for name in told["defect"].to_pylist()]
    copy = np.array([defect.duplicate for defect in of], bool) & ~as_bool(told["twin"])
    exclude = [None if own else origin for own, origin in zip(copy, told["origin"].to_pylist(), strict=True)]
    table, unmeasured, nearness = _ask_reducers(real, refs, scored, exclude, table)
    caught = drops(keep, table, {name: Threshold(p["value"], 0, p.get("high")) for name, p in real.thresholds.items()})
    there = _kept(real)
    for rule in keep:
        if rule.one_per is not None:
            taken = _taken(real, rule.one_per, table[rule.one_per], exclude, there)
            taken |= copy & as_bool(pc.is_valid(table[rule.one_per]))
            caught[rule.name] = taken | unmeasured[rule.one_per.partition(".")[0]]
    texts = choose_texts(real.texts.at(real.thresholds), table, np.zeros(table.num_rows, bool)).to_pylist()
    pairs = zip(texts, of, strict=True)
    caught[TEXTS] = np.array([all(d.text and t["kind"] == SYNTHETIC for t in row) for row, d in pairs], bool)
    caught[SELECTION_AS_A_WHOLE] = np.logical_or.reduce(list(caught.values()))
    columns = {name: numbers(table[name], name) for name in found} | nearness
    return caught, columns


def _ask_reducers(
    real: Judged, refs: Sequence[ShardRef], scored: Mapping[str, str], exclude: Sequence[str | None], table: pa.Table
) -> tuple[pa.Table, Masks, Masks]:
    """`table` with the columns that reducers answer; for each reducer where it had nothing to go by; and how near its
    answer is, as scores: `group` is 1 where there is none, a number beside it then infinite."""
    unmeasured: Masks = {}
    nearness: Masks = {}
    for name, reducer in real.reducers.items():
        known = (real.store, name, reducer, real.shards, real.scores, real.trusted)
        answers, unmeasured[name] = asked(*known, {"canaries": refs}, exclude, real.engine, real.workers)
        grouped = "group" in answers.column_names
        alone = answers["group"].is_null().to_numpy() if grouped else np.zeros(table.num_rows, bool)
        nearness |= {f"{name}.group": alone.astype(float)} if grouped else {}
        for column in answers.column_names:
            table = table.append_column(f"{name}.{column}", answers[column])
            if any(test(answers[column].type) for test in NUMBERS):
                nearness[f"{name}.{column}"] = np.where(alone, np.inf, numbers(answers[column], name))
    return table, unmeasured, nearness


def _numeric(store: Store, ref: ShardRef, scores: Mapping[str, str]) -> list[str]:
    """The score columns with one number (of a list its first) per pair; half floats are embeddings, no scores."""
    found = []
    for name, folder in scores.items():
        for column in store.read_table(ref.beside(folder)).schema:
            kind = column.type.value_type if pa.types.is_list(column.type) else column.type
            if any(test(kind) for test in NUMBERS):
                found.append(f"{name}.{column.name}")
    return found


def _kept(real: Judged) -> pa.Array:
    """uids of the pairs that the selection keeps."""
    found = [pa.array([], pa.string())]
    for ref in (ref for refs in real.shards.values() for ref in refs):
        table = real.store.read_table(ref.beside(real.selection), ["uid", "kept"])
        found += table.filter(table["kept"])["uid"].chunks
    return pa.concat_arrays(found)


def _taken(
    real: Judged, column: str, groups: pa.ChunkedArray, exclude: Sequence[str | None], kept: pa.Array
) -> np.ndarray:
    """Whether a pair among `kept` is in each query's group, the excluded one left aside."""
    frame = load_frame(real.store, real.shards, [column], real.scores, real.trusted)
    met = pc.is_in(frame.table[column], pc.drop_null(groups.unique()))
    part = frame.table.filter(pc.and_(pc.is_in(frame.table["uid"], kept), met))
    count = Counter(part[column].to_pylist())
    group_of = dict(zip(part["uid"].to_pylist(), part[column].to_pylist(), strict=True))
    return np.array(
        [
            group is not None and count[group] > (without is not None and group_of.get(without) == group)
            for group, without in zip(groups.to_pylist(), exclude, strict=True)
        ],
        bool,
    )
