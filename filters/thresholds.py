"""Thresholds that a selection finds: over all rows (quantiles) or over canaries (`target_recall`), once, and pins.

`pins.json` in the selection's folder holds them before its first table is written; later increments reuse them.
Recalibrating finds them anew and, where they moved, starts another folder, which `recalibrated.json` in the first one
names. Rules with another condition for some sources are judged, and their thresholds found, part by part.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from filters.canaries import fitting
from filters.columns import Frame
from filters.rules import Threshold, fit_false_drops, fit_recall, nulls, passes, quantile
from pairs.fingerprint import fingerprint
from pairs.rules import Rule, TextsSpec
from pairs.shard import ShardRef
from pairs.store import Store

Thresholds = dict[str, Threshold]


def drops(
    keep: Sequence[Rule], table: pa.Table, pins: Thresholds, source: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Which rows of `table` each rule over a column would drop, by its name; `pins` are the thresholds that were found.
    With each row's `source` the rules' overrides hold."""
    return {r.name: _dropped(r, table[r.column], pins, source) for r in keep if r.one_per is None}


def _dropped(rule: Rule, column: pa.ChunkedArray, pins: Thresholds, source: np.ndarray | None) -> np.ndarray:
    dropped = np.zeros(len(column), bool)
    for name, case, rows in _cases(rule, source, len(column)):
        if case is not None and rows.any():
            part = column if rows.all() else column.filter(pa.array(rows))
            dropped[rows] = ~passes(case, part, pins.get(name))
    return dropped


def _cases(rule: Rule, source: np.ndarray | None, count: int) -> Iterator[tuple[str, Rule | None, np.ndarray]]:
    """Name, rule (None: off) and rows of each part of the corpus that a rule judges in its own way."""
    cases, others = rule.cases(), np.ones(count, bool)
    for name, case in list(cases.items())[1:] if source is not None else []:
        rows = np.asarray(source == name)
        others &= ~rows
        yield f"{rule.name} at {name}", case, rows
    yield rule.name, cases[""], others


def found(
    store: Store,
    keep: Sequence[Rule],
    texts: TextsSpec,
    frame: Frame,
    scores: Mapping[str, str],
    canaries: Sequence[ShardRef],
    pinned: Collection[str] = (),
) -> Thresholds:
    """What each fitted test is now: a quantile over all real scored rows that the rule judges but the held-out ones,
    `target_recall` over the canaries that may fit, `false_drops` of `texts` over the twins of swapped texts that may;
    without these nothing where it is `pinned`, else an error.
    Nothing is fitted to a corpus without rows."""
    counts = frame.alive & ~frame.held_out
    thresholds: Thresholds = {}
    for rule in (rule for rule in keep if counts.any() and rule.column is not None):
        for name, case, rows in _cases(rule, frame.source, len(counts)):
            if case is None or not case.fitted:
                continue
            if case.target_recall is not None:
                column = fitting(store, canaries, str(case.defect), str(case.column), scores)
                if name not in pinned or not nulls(column).all():
                    thresholds[name] = fit_recall(case, column)
            elif threshold := quantile(case, frame.table[case.column], counts & rows):
                thresholds[name] = threshold
    if texts.false_drops is not None and counts.any():
        column = fitting(store, canaries, "swapped_text", str(texts.match), scores, twins=True)
        if texts.name not in pinned or not nulls(column).all():
            thresholds[texts.name] = fit_false_drops(texts, column)
    return thresholds


def pinned(store: Store, folder: str) -> Thresholds:
    """The thresholds that a selection's folder holds already."""
    path = f"{folder}/pins.json"
    written = json.loads(store.read(path)) if store.has(path) else {}
    return {name: Threshold(**fields) for name, fields in written.items()}


def pin(store: Store, base: str, folder: str, now: Thresholds, recalibrate: bool) -> tuple[str, Thresholds]:
    """The folder to write to and the thresholds in force. What was never pinned (nothing was scored) is pinned now."""
    path, pins = f"{folder}/pins.json", pinned(store, folder)
    if recalibrate and any(_ends(pins[name]) != _ends(now[name]) for name in pins if name in now):
        pins = pins | now
        values = {name: _ends(threshold) for name, threshold in pins.items()}
        folder = f"{base.rsplit('-', 1)[0]}-{fingerprint({'base': base, 'pins': values})}"
        path = f"{folder}/pins.json"
    pins = now | pins
    if pins or not store.has(path):
        store.write(path, json.dumps({name: vars(one) for name, one in sorted(pins.items())}, indent=1))
    if folder != current(store, base):
        store.write(f"{base}/recalibrated.json", json.dumps({"folder": folder}))
    return folder, pins


def _ends(threshold: Threshold) -> float | list[float | None] | None:
    """What two thresholds are told apart by: the number, or both where there is an upper one."""
    return threshold.value if threshold.high is None else [threshold.value, threshold.high]


def current(store: Store, base: str) -> str:
    """The folder in force: `base`, or the one that the latest recalibration started."""
    path = f"{base}/recalibrated.json"
    return str(json.loads(store.read(path))["folder"]) if store.has(path) else base


def told(pins: Thresholds, now: Thresholds) -> dict[str, Any]:
    """What a manifest says of the thresholds in force, and of what they would be now."""
    fitted = {"target_recall": "fitting canaries", "false_drops": "fitting twins"}
    of = {name: next((of for test, of in fitted.items() if f" {test} " in name), "scored rows") for name in pins}
    return {
        name: {
            "value": pin.value,
            **({} if pin.high is None else {"high": pin.high}),
            "found": f"by {name} over {pin.rows} {of[name]}",
            "now": now[name].number if name in now else None,
            "rows_now": now[name].rows if name in now else 0,
        }
        for name, pin in sorted(pins.items())
    }
