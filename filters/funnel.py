"""The funnel: how many pairs each step dropped, from candidates to what is kept. The counts add up.

Per source and in total: candidates, what became of each when it was fetched (ledger statuses by reason), the pairs,
then for each rule in its order how many it was the first to drop, how many it would drop alone, and how
many had no value for it. What was never attempted and what was fetched without becoming a pair have their own lines.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairs.store import Store

Counts = dict[str, Any]


def fetch_counts(store: Store, source: str, groups: Sequence[str], increments: Sequence[str], pairs: int) -> Counts:
    """Candidates of these increments of a source (`groups`: `<source>-<fetch fingerprint>`), and what became of them:
    `fetch` maps outcome to count and adds up to them."""
    paths = [f"candidates/{source}/{increment}/part-00000.parquet" for increment in increments]
    candidates = sum(store.read_table(path, ["url_key"]).num_rows for path in paths if store.has(path))
    if not candidates:
        return {"candidates": None, "fetch": {}}
    outcome: Counter[str] = Counter()
    folders = [f"ledger/{group}/{increment}" for group in groups for increment in increments]
    for path in (path for folder in folders for path in store.files(folder, ".parquet")):
        table = store.read_table(path, ["status", "reason"])
        reason = pc.binary_join_element_wise(table["status"], pc.fill_null(table["reason"], "None"), "/")
        outcome.update(_counted(pc.if_else(pc.equal(table["status"], "ok"), "ok", reason)))
    outcome["not attempted"] = candidates - outcome.total()
    outcome["ok, but no pair"] = outcome.pop("ok", 0) - pairs
    return {"candidates": candidates, "fetch": {"pair": pairs} | {k: n for k, n in sorted(outcome.items()) if n}}


def rule_counts(
    names: Sequence[str], table: pa.Table, nulls: Mapping[str, np.ndarray], trusted: np.ndarray, rows: np.ndarray
) -> Counts:
    """Pairs, rules and kept of a selection's `table` at `rows` (bool); `dropped_by` says each row's first rule."""
    part = table if rows.all() else table.filter(pa.array(rows))
    first, would = _counted(part["dropped_by"]), _counted(pc.list_flatten(part["would_drop"]))
    assert set(first) <= {None, *names}, f"dropped by {set(first)}, which are not all among {names}"
    rules, left = [], part.num_rows
    for name in names:
        left -= first[name]
        null = int((nulls[name] & rows).sum()) if name in nulls else 0
        rules.append({"name": name, "dropped": first[name], "would_drop": would[name], "nulls": null, "left": left})
    assert left == first[None], f"{left} pairs are left, {first[None]} are kept"
    return {"pairs": part.num_rows, "trusted": int((trusted & rows).sum()), "rules": rules, "kept": left}


def _counted(column: pa.ChunkedArray) -> Counter[Any]:
    counts = column.value_counts()
    return Counter(dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)))


def total(sources: Mapping[str, Counts]) -> Counts:
    """The sum over all sources."""
    if not sources:
        return {"candidates": None, "fetch": {}, "pairs": 0, "trusted": 0, "rules": [], "kept": 0}
    fetch: Counter[str] = Counter()
    for counts in sources.values():
        fetch.update(counts["fetch"])
    known = [counts["candidates"] for counts in sources.values() if counts["candidates"] is not None]
    rules = []
    for same in zip(*(counts["rules"] for counts in sources.values()), strict=True):
        rules.append({"name": same[0]["name"]} | {k: sum(rule[k] for rule in same) for k in same[0] if k != "name"})
    sums = {key: sum(counts[key] for counts in sources.values()) for key in ("pairs", "trusted", "kept")}
    return {"candidates": sum(known) if known else None, "fetch": dict(fetch), "rules": rules, **sums}
