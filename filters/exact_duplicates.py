"""Pairs whose original image files are the same byte for byte.

`group` is the uid of the group's leader: the earliest pair with these bytes, in the order increment, trusted first,
uid. Increments answer one after another, so a leader never loses its place to a pair that comes later. One
dictionary lookup per pair. A pair without a hash (forgotten) has no group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from filters.base import Reducer


def in_order(table: pa.Table) -> pa.Array:
    """Row numbers in the order in which reducers give out leaders: increment, trusted first, uid."""
    keys = table.select(["increment", "uid"]).append_column("later", pc.cast(pc.invert(table["trusted"]), pa.int8()))
    return pc.sort_indices(keys, [("increment", "ascending"), ("later", "ascending"), ("uid", "ascending")])


@dataclass(frozen=True)
class ExactDuplicates(Reducer):
    """`group`: uid of the earliest pair with the same original bytes (its own where it is the first)."""

    needs = ("sha256",)  # type: ignore[assignment]
    columns = {"group": pa.string()}  # type: ignore[assignment]

    def reduce(self, existing: pa.Table, new: pa.Table) -> pa.Table:
        groups = dict(zip(existing["sha256"].to_pylist(), existing["group"].to_pylist(), strict=True))
        hashes, uids = new["sha256"].to_pylist(), new["uid"].to_pylist()
        for row in in_order(new).to_pylist():
            groups.setdefault(hashes[row], uids[row])
        groups[None] = None
        return pa.table({"group": pa.array([groups[value] for value in hashes], pa.string())})

    def query(self, corpus: pa.Table, queries: pa.Table, exclude: Sequence[str | None]) -> pa.Table:
        holders: dict[str | None, list[tuple[str, str]]] = {}
        wanted = set(queries["sha256"].to_pylist()) - {None}
        for value, group, uid in zip(*(corpus[n].to_pylist() for n in ("sha256", "group", "uid")), strict=True):
            if value in wanted:
                holders.setdefault(value, []).append((group, uid))
        found = [
            next((group for group, uid in holders.get(value, []) if uid != without), None)
            for value, without in zip(queries["sha256"].to_pylist(), exclude, strict=True)
        ]
        return pa.table({"group": pa.array(found, pa.string())})
