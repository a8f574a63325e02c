"""Pairs whose original image files are the same byte for byte, and those whose pixels are.

`group` is the uid of the group's leader: the earliest pair with these bytes, in the order increment, trusted first,
uid. Increments answer one after another, so a leader never loses its place to a pair that comes later. A copy in
another lossless format, or with other metadata, has other bytes and the same pixels: `pixel_group`, of the images as
they are stored. One dictionary of hashes. A pair without a hash (forgotten, or it doesn't decode) has no group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.base import Reducer
from filters.leaders import both, turns


@dataclass(frozen=True)
class ExactDuplicates(Reducer):
    """`group`: uid of the earliest pair with the same original bytes (its own where it is the first). `pixel_group`,
    where `pixels` names a column of hashes such as image_hash.sha256: of the earliest with the same pixels."""

    pixels: str | None = None

    takes = {"pixels": pa.string()}

    @property
    def needs(self) -> tuple[str, ...]:
        return ("sha256",) if self.pixels is None else ("sha256", self.pixels)

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        return {name: pa.string() for name in self._groups()}

    def _groups(self) -> dict[str, str]:
        return dict(zip(("group", "pixel_group"), self.needs, strict=False))

    def reduce(self, existing: pa.Table, new: pa.Table) -> pa.Table:
        return pa.table({group: _earliest(existing, new, need, group) for group, need in self._groups().items()})

    def query(self, corpus: pa.Table, queries: pa.Table, exclude: Sequence[str | None]) -> pa.Table:
        found = {group: _holders(corpus, queries, exclude, need, group) for group, need in self._groups().items()}
        return pa.table({group: pa.array(names, pa.string()) for group, names in found.items()})


def _earliest(existing: pa.Table, new: pa.Table, need: str, group: str) -> pa.Array:
    """The group of each new row: that of the first row with its hash, which may not be the leader: it is forgotten."""
    old = existing.filter(existing[group].is_valid())
    code = pc.fill_null(both(old, new, need).dictionary_encode().indices, -1).to_numpy().astype(np.int64)
    turn = turns(old, new)
    values, place = np.unique(code[turn], return_index=True)
    asked = code[old.num_rows :]
    rows = turn[place][np.searchsorted(values, asked)]
    return both(old, new, group, "uid").take(pa.array(rows, mask=asked < 0))


def _holders(
    corpus: pa.Table, queries: pa.Table, exclude: Sequence[str | None], need: str, group: str
) -> list[str | None]:
    wanted = set(queries[need].to_pylist()) - {None}
    holders: dict[str | None, list[tuple[str, str]]] = {}
    part = corpus.filter(pc.is_in(corpus[need], pa.array(sorted(wanted), pa.string())))
    for value, name, uid in zip(*(part[n].to_pylist() for n in (need, group, "uid")), strict=True):
        holders.setdefault(value, []).append((name, uid))
    return [
        next((name for name, uid in holders.get(value, []) if uid != without), None)
        for value, without in zip(queries[need].to_pylist(), exclude, strict=True)
    ]
