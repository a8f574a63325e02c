"""How good the filters are, told by the canaries: recall, false drops on the twins, and ROC-AUC, with intervals.

The rules are asked with the thresholds that the selection pinned, and only the reporting half is counted. Reducers
are queried, so a canary changes no real row. A swapped text's image is asked without its original, since its defect
isn't the image; of the near duplicates only the twins are. A swapped text is caught where its web text isn't kept,
whatever becomes of synthetic ones. Precision depends on how common a defect is, so it stands beside a prevalence.
Intervals are Wilson's at 95 %; an AUC's variance is at most A(1-A)/min(m, n) (Birnbaum and Klose, 1957), so
Wilson's with the smaller count is a wide enough one.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.base import Reducer
from filters.canaries import facts, reporting
from filters.columns import load_frame
from filters.reduce import ask
from filters.rules import Threshold, numbers
from filters.selection import TEXTS, drops, rule_columns
from filters.texts import SYNTHETIC, choose_texts, column_names
from pairs.recipe import Rule, TextsSpec
from pairs.shard import ShardRef
from pairs.store import Store

Z = 1.959964  # 95 %
SELECTION_AS_A_WHOLE = "selection"
NUMBERS = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_float32, pa.types.is_float64)


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


def report(canaries: Sequence[ShardRef], real: Judged, prevalence: float = 0.1) -> dict[str, Any]:
    """Per defect: `canaries` and `twins` counted, `rules` (name, recall, false_drops; the last one is the selection as
    a whole), `auc` of each numeric score, `precision` at `prevalence`.

    A figure is {value, low, high, n}. Empty `defects` where there are no canaries.
    """
    defects = {}
    for ref in canaries:
        told = facts(real.store, ref)
        caught, columns = _caught(real, ref, told)
        defects[told["defect"][0].as_py()] = _figures(caught, columns, *reporting(told), prevalence)
    return {"half": "report", "prevalence": prevalence, "defects": defects}


def _figures(
    caught: Mapping[str, np.ndarray],
    columns: Mapping[str, np.ndarray],
    canary: np.ndarray,
    twin: np.ndarray,
    prevalence: float,
) -> dict[str, Any]:
    shares = {n: (wilson(m[canary].sum(), canary.sum()), wilson(m[twin].sum(), twin.sum())) for n, m in caught.items()}
    return {
        "canaries": int(canary.sum()),
        "twins": int(twin.sum()),
        "rules": [{"rule": name, "recall": recall, "false_drops": wrong} for name, (recall, wrong) in shares.items()],
        "auc": [{"column": name, "auc": roc_auc(values[canary], values[twin])} for name, values in columns.items()],
        "precision": precision(*shares[SELECTION_AS_A_WHOLE], prevalence),
    }


def _caught(real: Judged, ref: ShardRef, told: pa.Table) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Which rows of a canary shard each rule would drop, and the numeric scores of all of them."""
    scored = {name: path for name, path in real.scores.items() if real.store.has(ref.beside(path))}
    read = [
        c for c in [*rule_columns(real.keep), *column_names(real.texts)] if c.partition(".")[0] not in real.reducers
    ]
    found = _numeric(real.store, ref, scored)
    table = load_frame(real.store, {"canaries": [ref]}, [*read, *found], scored, []).table
    swapped = told["defect"][0].as_py() == "swapped_text"
    exclude = [None if not twin and not swapped else origin for origin, twin in _rows(told, "origin", "twin")]
    table, unmeasured = _ask_reducers(real, ref, exclude, table)
    caught = drops(real.keep, table, {name: Threshold(pin["value"], 0) for name, pin in real.thresholds.items()})
    for rule in real.keep:
        if rule.one_per is not None:
            taken = _taken(real, rule.one_per, table[rule.one_per], exclude)
            caught[rule.name] = taken | unmeasured[rule.one_per.partition(".")[0]]
    kept = choose_texts(real.texts, table, np.zeros(table.num_rows, bool)).to_pylist()
    caught[TEXTS] = np.array([all(swapped and t["kind"] == SYNTHETIC for t in row) for row in kept], bool)
    caught[SELECTION_AS_A_WHOLE] = np.logical_or.reduce(list(caught.values()))
    return caught, {name: numbers(table[name], name) for name in found}


def _ask_reducers(
    real: Judged, ref: ShardRef, exclude: Sequence[str | None], table: pa.Table
) -> tuple[pa.Table, dict[str, np.ndarray]]:
    """`table` with the columns that reducers answer, and for each reducer where it had nothing to go by."""
    unmeasured = {}
    for name in sorted({column.partition(".")[0] for column in rule_columns(real.keep)} & set(real.reducers)):
        known = (real.store, name, real.reducers[name], real.shards, real.scores, real.trusted)
        answers, unmeasured[name] = ask(*known, {"canaries": [ref]}, exclude)
        for column in answers.column_names:
            table = table.append_column(f"{name}.{column}", answers[column])
    return table, unmeasured


def _rows(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def _numeric(store: Store, ref: ShardRef, scores: Mapping[str, str]) -> list[str]:
    """The score columns with one number (of a list its first) per pair; half floats are embeddings, no scores."""
    found = []
    for name, folder in scores.items():
        for column in store.read_table(ref.beside(folder)).schema:
            kind = column.type.value_type if pa.types.is_list(column.type) else column.type
            if any(test(kind) for test in NUMBERS):
                found.append(f"{name}.{column.name}")
    return found


def _taken(real: Judged, column: str, groups: pa.ChunkedArray, exclude: Sequence[str | None]) -> np.ndarray:
    """Whether the selection keeps a pair of each query's group, the excluded one left aside."""
    frame = load_frame(real.store, real.shards, [column], real.scores, real.trusted)
    judged = [real.store.read_table(ref.beside(real.selection), ["kept"]) for _, ref in frame.shards]
    part = frame.table.filter(pa.concat_tables(judged)["kept"])
    count = Counter(part[column].to_pylist())
    own = part.filter(pc.is_in(part["uid"], pa.array([e for e in exclude if e], pa.string())))
    group_of = dict(_rows(own, "uid", column))
    return np.array(
        [
            group is not None and count[group] > (without is not None and group_of.get(without) == group)
            for group, without in zip(groups.to_pylist(), exclude, strict=True)
        ],
        bool,
    )


def wilson(hits: float, n: float) -> dict[str, Any]:
    """A share with Wilson's 95 % interval; `hits` of 0 to `n`, null where n is 0."""
    n, hits = int(n), float(hits)
    if not n:
        return {"value": None, "low": None, "high": None, "n": 0}
    share, spread = hits / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * np.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return {"value": share, "low": float(max(0.0, middle - half)), "high": float(min(1.0, middle + half)), "n": n}


def roc_auc(canaries: np.ndarray, twins: np.ndarray) -> dict[str, Any]:
    """The chance that a twin scores higher than a canary, ties half; 0.5 tells nothing, below it the score is turned
    round. Nulls (NaN) are left out."""
    bad, good = canaries[~np.isnan(canaries)], np.sort(twins[~np.isnan(twins)])
    if not len(bad) or not len(good):
        return wilson(0, 0)
    above = len(good) - (np.searchsorted(good, bad, "left") + np.searchsorted(good, bad, "right")) / 2
    n = min(len(bad), len(good))
    return wilson(float(above.mean() / len(good)) * n, n)


def precision(recall: Mapping[str, Any], false_drops: Mapping[str, Any], prevalence: float) -> dict[str, Any]:
    """Of what is dropped, the share that has the defect, if `prevalence` of the pairs have it; the interval takes
    the two figures' ends together."""

    def share(caught: float | None, wrong: float | None) -> float | None:
        if caught is None or wrong is None:
            return None
        dropped = prevalence * caught + (1 - prevalence) * wrong
        return prevalence * caught / dropped if dropped else None

    ends = {"low": share(recall["low"], false_drops["high"]), "high": share(recall["high"], false_drops["low"])}
    return {"prevalence": prevalence, "value": share(recall["value"], false_drops["value"]), **ends, "n": recall["n"]}


def recall_at_false_drops(
    scores_canaries: np.ndarray, scores_twins: np.ndarray, false_drop_rate: float
) -> dict[str, Any]:
    """The share of canaries below the highest threshold that drops at most `false_drop_rate` of the twins.

    A score that is NaN is dropped at any threshold, as rules do. What is compared between two scorers has to be asked
    at the same rate: that is how a round's model earns its promotion.
    """
    bad, good = (np.where(np.isnan(v), -np.inf, v.astype(float)) for v in (scores_canaries, scores_twins))
    allowed = int(false_drop_rate * len(good))
    threshold = np.sort(good)[allowed] if allowed < len(good) else np.inf
    return wilson(((bad < threshold) | np.isneginf(bad)).sum(), len(bad)) | {"threshold": float(threshold)}
