"""Pairs whose images look alike: perceptual hashes within a Hamming radius of a leader.

Each pair in turn (increment, trusted first, uid) joins the earliest leader within `max_distance` bits, or becomes a
leader. So there is no chaining (two members are at most 2 x max_distance apart), recall is exact, and increments
that come later change no earlier answer. Equal hashes are asked once: of a value, the first row's answer is
everyone's. A pair without a hash has no group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.base import Reducer
from filters.exact_duplicates import in_order
from filters.hamming import HammingIndex, leaders
from pairs.errors import PairmillError


@dataclass(frozen=True)
class NearDuplicates(Reducer):
    """`group`: uid of the leader; `distance`: differing bits to it (0 to `max_distance`; 0 for the leader itself)."""

    hash: str = "image_hash.phash"  # a column of 64-bit hashes
    max_distance: int = 4

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.hash,)

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        return {"group": pa.string(), "distance": pa.int32()}

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 12:
            raise PairmillError(
                expected="near_duplicates.max_distance from 0 to 12 (of 64 bits)",
                found=str(self.max_distance),
                remedy="4 finds re-encoded and resized copies; above 12 unlike images meet",
            )

    def reduce(self, existing: pa.Table, new: pa.Table) -> pa.Table:
        old = existing.filter(
            pc.and_kleene(pc.equal(existing["group"], existing["uid"]), pc.is_valid(existing[self.hash]))
        )
        old, order = old.take(in_order(old)), in_order(new).to_numpy().astype(np.int64)
        values_N, known_N = bits(new[self.hash])
        order = order[known_N[order]]
        joined = np.concatenate([bits(old[self.hash])[0], values_N[order]])
        _, first, inverse = np.unique(joined, return_index=True, return_inverse=True)
        places = np.sort(first)  # rows of `joined` that show a value first
        rank = np.searchsorted(places, first)[inverse]
        leader = places[leaders(joined[places], int((places < old.num_rows).sum()), self.max_distance)[rank]]
        names = pa.concat_arrays([_flat(old["uid"]), _flat(new["uid"]).take(pa.array(order))])
        chosen = leader[old.num_rows :]
        distance = np.bitwise_count(joined[old.num_rows :] ^ joined[chosen])
        return _scatter(new.num_rows, order, names.take(pa.array(chosen)), distance)

    def query(self, corpus: pa.Table, queries: pa.Table, exclude: Sequence[str | None]) -> pa.Table:
        """A row that is left out is represented by the members of its group, under the group's name."""
        without = pa.array([uid for uid in exclude if uid is not None], pa.string())
        leads = pc.equal(corpus["group"], corpus["uid"])
        corpus = corpus.filter(pc.or_kleene(leads, pc.is_in(corpus["group"], without)))
        corpus = corpus.take(in_order(corpus))
        uid_N, group_N = (np.array(corpus[name].to_pylist(), object) for name in ("uid", "group"))
        corpus_values_N, queries_values_Q = bits(corpus[self.hash])[0], bits(queries[self.hash])[0]
        known_Q, left_out_Q = bits(queries[self.hash])[1], np.array(list(exclude), object)
        none = len(uid_N)
        found = np.full(queries.num_rows, none, np.int64)
        for asking, rows in HammingIndex(corpus_values_N).within(queries_values_Q, self.max_distance):
            stands = (uid_N[rows] == group_N[rows]) | (group_N[rows] == left_out_Q[asking])
            valid = known_Q[asking] & (uid_N[rows] != left_out_Q[asking]) & stands
            np.minimum.at(found, asking[valid], rows[valid])
        hit = np.flatnonzero(found < none)
        groups = pa.array(group_N[found[hit]].tolist(), pa.string())
        return _scatter(len(found), hit, groups, np.bitwise_count(queries_values_Q[hit] ^ corpus_values_N[found[hit]]))


def bits(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A column of 64-bit hashes (16 hex digits) as uint64, 0 where null, and where it isn't null."""
    flat = _flat(column)
    known = flat.is_valid().to_numpy(zero_copy_only=False)
    words = pc.fill_null(flat.cast(pa.string()), "0" * 16).to_pylist()
    if any(len(word) != 16 for word in words):
        raise PairmillError(
            expected="hashes of 16 hex digits (64 bits) in the column that near_duplicates.hash names",
            found=repr(next(word for word in words if len(word) != 16))[:80],
            remedy="name a column that holds them, such as image_hash.phash",
        )
    return np.frombuffer(bytes.fromhex("".join(words)), ">u8").astype(np.uint64), known


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _scatter(count: int, rows: np.ndarray, groups: pa.Array, distance: np.ndarray) -> pa.Table:
    """A table of `count` rows with the values at `rows` and null elsewhere."""
    take = np.full(count, -1, np.int64)
    take[rows] = np.arange(len(rows))
    places = pa.array(take, mask=take < 0)
    return pa.table({"group": groups.take(places), "distance": pa.array(distance, pa.int32()).take(places)})
