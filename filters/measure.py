"""One batch through one filter: its values as Arrow columns, with the pairs that make it fail set apart.

A batch that raises is halved until the culprits stand alone; they become null and are counted by reason. The rest is
measured once more, together, as if the culprits had been forgotten. A call that kills its process is such a failure
too, where a guard (`cluster/guard.py`) makes it: then each halving costs a process and what the filter loads, log2 of
the batch for one culprit. A user's mistake (`PairmillError`) and a broken assertion are nobody's bad pair: they stop
the run.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa

from cluster.guard import Crashed
from filters.base import Batch, Filter
from pairs.errors import PairmillError

NOT_THE_PAIR = (PairmillError, AssertionError, NotImplementedError, ImportError)
VARYING = re.compile(r"'.*'|\".*\"|0x[0-9a-fA-F]+|\d{5,}", re.DOTALL)  # a pair's content, an address: not the reason

Ask = Callable[..., Any]  # calls its first argument with the others, here or in another process
T = TypeVar("T")


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


def here(function: Callable[..., T], *arguments: Any) -> T:
    """Calls `function` in this process."""
    return function(*arguments)


def measure(filter_: Filter, batch: Batch, stats: FilterStats, ask: Ask = here) -> tuple[pa.Table, dict[int, str]]:
    """The filter's columns for `batch`, row by row, and why rows failed; `stats` is brought up to date."""
    started = time.perf_counter()
    failed: dict[int, str] = {}
    pieces = isolate(lambda rows: ask(as_table, filter_, batch.take(rows)), range(len(batch)), failed)
    table = pa.concat_tables([empty(filter_), *pieces])
    if failed:
        places = iter(range(table.num_rows))
        table = table.take(pa.array([None if i in failed else next(places) for i in range(len(batch))], pa.int64()))
    stats.seconds += time.perf_counter() - started
    stats.pairs += len(batch)
    stats.nulls.update({name: table[name].null_count for name in table.column_names if table[name].null_count})
    stats.errors.update(failed.values())
    return table, failed


def isolate(work: Callable[[Sequence[int]], T], rows: Sequence[int], failed: dict[int, str]) -> list[T]:
    """`work` over `rows` without those that make it fail alone, which go into `failed` with the reason: in one piece,
    or in pieces, in order, where even the good rows fail together."""
    pieces = _halves(work, rows, failed)
    good = [row for row in rows if row not in failed]
    return _halves(work, good, failed) if good and len(good) < len(rows) else pieces


def _halves(work: Callable[[Sequence[int]], T], rows: Sequence[int], failed: dict[int, str]) -> list[T]:
    try:
        return [work(rows)]
    except NOT_THE_PAIR:
        raise
    except Exception as error:
        if len(rows) == 1:
            failed[rows[0]] = reason(error)
            return []
        middle = len(rows) // 2
        return _halves(work, rows[:middle], failed) + _halves(work, rows[middle:], failed)


def reason(error: Exception) -> str:
    """What to count an error under: its kind and message, without what is the pair's own (quoted) or the moment's."""
    told = VARYING.sub("…", " ".join(str(error).split()))[:80]
    return told if isinstance(error, Crashed) else f"{type(error).__name__}: {told}"


def empty(filter_: Filter) -> pa.Table:
    """The filter's columns, without rows."""
    return pa.schema(list(filter_.columns.items())).empty_table()


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
