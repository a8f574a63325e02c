"""Pairs whose images look alike: perceptual hashes within a Hamming radius of a leader, and a longer hash that agrees.

Two stages, because no one hash does both: 64 bits are looked up with a wide radius, and 256 bits confirm it.
On webs that the radii were chosen on, they find 99 % of 1,728 copies that were cropped by 2 to 4 %, rescaled and
re-encoded, and join 1 of 2,378 unlike rows. Alone, `phash` within 4 bits finds 62 % of such copies; `dhash` within 8
finds nearly all, but 2.8 % of the originals have an unlike one so near.
Each pair in turn (increment, trusted first, uid) joins the earliest leader that is near, or becomes a leader. So there
is no chaining (two members are at most 2 x max_distance apart), recall is exact, and increments that come later change
no earlier answer. Rows whose hashes are all equal are asked once. A pair that lacks a hash has no group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.base import Reducer
from filters.hamming import HammingIndex, distance, leaders, scattered
from filters.leaders import Pairs, both, earliest, first_equal, in_order, scatter, stand_in, turns
from pairs.errors import PairmillError

CONFIRM_DISTANCE = 42  # of the 256 bits of image_hash.dhash_256


@dataclass(frozen=True)
class NearDuplicates(Reducer):
    """`group`: uid of the leader; `distance`: bits of `hash` that differ from it (0 to `max_distance`; 0 for the leader
    itself). Near is: at most `max_distance` bits of `hash` differ, and at most `confirm_distance` bits of `confirm`."""

    hash: str = "image_hash.dhash"  # a column of 64-bit hashes
    max_distance: int = 10
    confirm: str | None = "image_hash.dhash_256"  # hashes of any number of 64-bit words; null: no second stage
    confirm_distance: int = CONFIRM_DISTANCE

    takes = {"hash": pa.string(), "confirm": pa.string()}

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.hash,) if self.confirm is None else (self.hash, self.confirm)

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        return {"group": pa.string(), "distance": pa.int32()}

    def __post_init__(self) -> None:
        if not 0 <= self.max_distance <= 12:
            raise PairmillError(
                expected="near_duplicates.max_distance from 0 to 12 (of 64 bits)",
                found=str(self.max_distance),
                remedy="10 finds lightly cropped, resized and re-encoded copies, if a longer hash confirms them",
            )
        if self.confirm_distance < 0:
            raise PairmillError(
                expected="near_duplicates.confirm_distance of 0 or more bits",
                found=str(self.confirm_distance),
                remedy=f"{CONFIRM_DISTANCE} suits image_hash.dhash_256; `confirm: null` switches the second stage off",
            )
        if self.confirm is None and self.confirm_distance not in (0, CONFIRM_DISTANCE):
            raise PairmillError(
                expected="near_duplicates.confirm, a column of hashes for confirm_distance",
                found=f"confirm_distance {self.confirm_distance} without one",
                remedy="name a column such as image_hash.dhash_256, or leave confirm_distance out",
            )

    def reduce(self, existing: pa.Table, new: pa.Table) -> pa.Table:
        old = existing.filter(pa.array(stand_in(existing)))
        values, known = self._values(old, new)
        turn = turns(old, new)
        turn = turn[known[turn]]
        values, led = values[turn], int((turn < old.num_rows).sum())
        first = first_equal(values)
        places = np.unique(first)  # rows that show their hashes first
        found = leaders(values[places], int((places < led).sum()), self.max_distance, self.confirm_distance)
        leader = places[found[np.searchsorted(places, first)]][led:]
        names = both(old, new, "group", "uid").take(pa.array(turn[leader]))
        bits = pa.array(distance(values[led:, 0], values[leader, 0]), pa.int32())
        return scatter(new.num_rows, turn[led:] - old.num_rows, {"group": names, "distance": bits})

    def query(self, corpus: pa.Table, queries: pa.Table, exclude: Sequence[str | None]) -> pa.Table:
        """A row that is left out is represented by the members of its group, under the group's name."""
        left_out = pc.is_in(corpus["group"], pa.array([uid for uid in exclude if uid is not None], pa.string()))
        corpus = corpus.filter(pc.or_(pa.array(stand_in(corpus)), left_out))
        corpus = corpus.take(in_order(corpus))
        values, known = self._values(corpus, queries)
        uid_N, group_N = (np.array(corpus[name].to_pylist(), object) for name in ("uid", "group"))
        none = len(uid_N)
        corpus_NW, queries_QW, known_N, known_Q = values[:none], values[none:], known[:none], known[none:]
        stands_N, left_out_Q = stand_in(corpus), np.array(list(exclude), object)

        def standing() -> Pairs:
            for asking, rows in HammingIndex(corpus_NW).within(queries_QW, self.max_distance, self.confirm_distance):
                stands = stands_N[rows] | (group_N[rows] == left_out_Q[asking])
                valid = known_Q[asking] & known_N[rows] & (uid_N[rows] != left_out_Q[asking]) & stands
                yield asking[valid], rows[valid]

        found = earliest(standing(), queries.num_rows, none)
        hit = np.flatnonzero(found >= 0)
        bits = pa.array(distance(queries_QW[hit, 0], corpus_NW[found[hit], 0]), pa.int32())
        groups = pa.array(group_N[found[hit]].tolist(), pa.string())
        return scatter(len(found), hit, {"group": groups, "distance": bits})

    def _values(self, *tables: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """`hash` and then the words of `confirm` of the rows of all `tables`, one table below the other: (N, W) uint64,
        and whether a row has them all."""
        hash_N1, known_N = words([table[self.hash] for table in tables], "hash")
        hash_N1 = scattered(hash_N1[:, 0])[:, None]  # as far from one another as before
        if self.confirm is None:
            return hash_N1, known_N
        confirm_NW, confirmed_N = words([table[self.confirm] for table in tables], "confirm")
        bits = 64 * confirm_NW.shape[1]
        if confirmed_N.any() and self.confirm_distance >= bits:
            raise PairmillError(
                expected=f"near_duplicates.confirm_distance below the {bits} bits of {self.confirm}",
                found=str(self.confirm_distance),
                remedy="about a seventh of the bits lets copies pass and few others",
            )
        return np.concatenate([hash_N1, confirm_NW], axis=1), known_N & confirmed_N


def words(columns: Sequence[pa.ChunkedArray], setting: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns of hashes, one below the other, as (N, W) uint64 with 0 where null, and where they aren't null.

    A word is 16 hex digits; `setting` "hash" has one. Parsed chunk by chunk, so only a chunk is ever held as text.
    """
    chunks = [chunk.cast(pa.string()) for column in columns for chunk in column.chunks]
    digits = max((pc.max(pc.binary_length(chunk)).as_py() or 0 for chunk in chunks), default=0) or 16
    parts = [_parse(chunk, digits, setting) for chunk in chunks]
    known = [chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in chunks]
    empty = np.zeros((0, digits // 16), np.uint64)
    return np.concatenate([empty, *parts]), np.concatenate([np.zeros(0, bool), *known])


def _parse(chunk: pa.StringArray, digits: int, setting: str) -> np.ndarray:
    right = pc.and_(pc.match_substring_regex(chunk, "^[0-9a-fA-F]+$"), pc.equal(pc.binary_length(chunk), digits))
    if digits % 16 or (digits > 16 and setting == "hash"):
        right = pc.and_(right, False)
    if len(wrong := chunk.filter(pc.invert(right))):
        size = "16 hex digits (64 bits)" if setting == "hash" else "16 hex digits per 64 bits, all of one length,"
        raise PairmillError(
            expected=f"hashes of {size} in the column that near_duplicates.{setting} names",
            found=repr(wrong[0].as_py())[:80],
            remedy=f"name a column that holds them, such as image_hash.{'dhash' if setting == 'hash' else 'dhash_256'}",
        )
    text = "".join(pc.fill_null(chunk, "0" * digits).to_pylist())
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64).reshape(len(chunk), digits // 16)
