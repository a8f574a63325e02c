"""One batch through one filter: its values as Arrow columns, with the pairs that make it fail set apart.

A batch that raises is halved until the culprits stand alone; they become null and are counted by reason, the rest
keep their values. A user's mistake (`PairmillError`) and a broken assertion are nobody's bad pair: they stop the run.
"""

import time
from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa

from filters.base import Batch, Filter
from pairs.errors import PairmillError

NOT_THE_PAIR = (PairmillError, AssertionError, NotImplementedError, ImportError)


@dataclass
class FilterStats:
    """What one filter did: pairs seen, nulls by column, seconds, and pairs that raised, by reason."""

    pairs: int = 0
    seconds: float = 0.0
    nulls: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, other: "FilterStats") -> None:
        self.pairs += other.pairs
        self.seconds += other.seconds
        self.nulls += other.nulls
        self.errors += other.errors


def measure(filter_: Filter, batch: Batch, stats: FilterStats) -> pa.Table:
    """The filter's columns for `batch`, row by row; `stats` is brought up to date."""
    started = time.perf_counter()
    table = _halving(filter_, batch, stats.errors)
    stats.seconds += time.perf_counter() - started
    stats.pairs += len(batch)
    stats.nulls.update({name: table[name].null_count for name in table.column_names if table[name].null_count})
    return table


def _halving(filter_: Filter, batch: Batch, errors: Counter[str]) -> pa.Table:
    try:
        return as_table(filter_, batch)
    except NOT_THE_PAIR:
        raise
    except Exception as error:
        if len(batch) > 1:
            middle = len(batch) // 2
            halves = (range(middle), range(middle, len(batch)))
            return pa.concat_tables([_halving(filter_, batch.take(rows), errors) for rows in halves])
        errors[f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"] += 1
        return pa.table({name: pa.nulls(1, kind) for name, kind in filter_.columns.items()})


def as_table(filter_: Filter, batch: Batch) -> pa.Table:
    """`score` once, its columns checked and given their declared types; NaN becomes null."""
    values = filter_.score(batch)
    name = type(filter_).__name__
    assert set(values) == set(filter_.columns), f"{name} declares {set(filter_.columns)}, made {set(values)}"
    arrays = {}
    for column, kind in filter_.columns.items():
        found = values[column]
        assert len(found) == len(batch), f"{name}.{column}: {len(found)} values for {len(batch)} pairs"
        arrays[column] = found.cast(kind) if isinstance(found, pa.Array) else pa.array(found, kind, from_pandas=True)
    return pa.table(arrays)
