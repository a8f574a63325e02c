"""Any filter, by name, with small settings, run over small shards: what the contract and golden tests share."""

import functools
import tempfile
from pathlib import Path

import pyarrow as pa

from filters.base import Filter, needed_filters
from filters.engine import PlannedFilter, plan, score_shards
from filters.lookup import load_filter
from pairs.shard import ShardRef
from pairs.store import Store
from tests.filters.weights import WEIGHTS

_held: list[tempfile.TemporaryDirectory[str]] = []  # removed when the tests end


def fresh_folder() -> Path:
    _held.append(tempfile.TemporaryDirectory())
    return Path(_held[-1].name)


@functools.cache
def small(name: str) -> Filter:
    """The filter with its defaults, or with tiny weights."""
    return load_filter(name, WEIGHTS[name](fresh_folder()) if name in WEIGHTS else {})


def with_needed(name: str) -> dict[str, Filter]:
    """The filter and all whose columns it needs, however far."""
    found = {name: small(name)}
    for need in needed_filters(small(name)):
        found |= with_needed(need)
    return found


def planned(name: str) -> tuple[list[PlannedFilter], PlannedFilter]:
    """The plan, and the filter's own line of it."""
    order = plan(with_needed(name))
    return order, next(one for one in order if one.name == name)


def scores(name: str, store: Store, refs: list[ShardRef]) -> list[pa.Table]:
    """The filter's tables for the shards, scored inline where they are missing."""
    order, one = planned(name)
    score_shards(store, order, refs, engine="inline", workers=1)
    return [store.read_table(ref.beside(one.folder)) for ref in refs]
