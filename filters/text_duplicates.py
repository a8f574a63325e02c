"""Pairs whose texts are the same but for a little: MinHash finds candidates, their pieces' Jaccard index confirms them.

Each pair in turn (increment, trusted first, uid) joins the earliest leader whose text is alike, or becomes a leader: no
chaining, and later increments change no answer. Texts that share one of 14 buckets are compared exactly, so what is
found is right; of what there is, 92 % are found at a Jaccard of 0.8 and 99.9 % at 0.9. Equal texts are asked once.
Templates ("photo 123 of 456") crowd buckets without being alike: a text is compared with the first of them only.
What `shingles` counts as a text; blank texts have no group. Kept per pair: 64 bytes and 4 for each piece.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.base import Reducer
from filters.columns import list_lengths
from filters.leaders import Ask, Pairs, both, earliest, expand, first_equal, in_order, leaders, scatter, stand_in, turns
from filters.shingles import BUCKETS, digest, jaccard, normal, shingles, sketch
from pairs.errors import PairmillError

CROWD = 8  # rows of a bucket that a text is compared with, in each index, the earliest


@dataclass(frozen=True)
class Pieces:
    """Distinct texts: their buckets (N, BUCKETS), and their pieces one text after another."""

    buckets_NB: np.ndarray
    piece_P: np.ndarray
    offsets: np.ndarray

    def index(self, rows: np.ndarray, minimum: float) -> Ask:
        """Answers which of `rows` are alike: (place among those that ask, place in `rows`)."""
        orders = [np.argsort(self.buckets_NB[rows, bucket], kind="stable") for bucket in range(BUCKETS)]
        sorted_ = [self.buckets_NB[rows[order], bucket] for bucket, order in enumerate(orders)]

        def ask(asking: np.ndarray) -> Pairs:
            pairs = [np.zeros(0, np.int64)]
            for bucket, (order, values) in enumerate(zip(orders, sorted_, strict=True)):
                wanted = self.buckets_NB[asking, bucket]
                first = np.searchsorted(values, wanted, "left")
                counts = np.minimum(np.searchsorted(values, wanted, "right") - first, CROWD)
                pairs += [place * len(rows) + order[found] for place, found in expand(first, counts)]
            place, row = np.divmod(np.unique(np.concatenate(pairs)), max(len(rows), 1))
            near = jaccard(self.piece_P, self.offsets, asking[place], rows[row]) >= minimum
            yield place[near], row[near]

        return ask


@dataclass(frozen=True)
class TextDuplicates(Reducer):
    """`group`: uid of the earliest leader whose text is alike; `jaccard`: how alike, `min_jaccard` to 1 (its own)."""

    text: str = "text"  # a column of texts: the pair's first, or filter.column
    min_jaccard: float = 0.8

    columns = {"group": pa.string(), "jaccard": pa.float32()}  # type: ignore[assignment]
    takes = {"text": pa.string()}

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.text,)

    def __post_init__(self) -> None:
        if not 0.5 <= self.min_jaccard <= 1:
            raise PairmillError(
                expected="text_duplicates.min_jaccard from 0.5 to 1",
                found=str(self.min_jaccard),
                remedy="0.8 joins captions of fifteen words that differ in one; below 0.5 few are found",
            )

    def condense(self, table: pa.Table) -> pa.Table:
        texts = [normal(text) for text in table[self.text].to_pylist()]
        piece_P, offsets = shingles(texts)
        made = {"pieces": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(piece_P))}
        made["buckets"] = pa.FixedSizeListArray.from_arrays(pa.array(sketch(piece_P, offsets).ravel()), BUCKETS)
        made["digest"] = pa.array(map(digest, texts), pa.uint64())
        table = table.drop_columns([self.text])
        for name, values in made.items():
            table = table.append_column(name, values)
        return table

    def reduce(self, existing: pa.Table, new: pa.Table) -> pa.Table:
        old = existing.filter(pa.array(stand_in(existing)))
        text, digests = _pieces(old, new), pc.fill_null(both(old, new, "digest"), pa.scalar(0, pa.uint64())).to_numpy()
        turn = turns(old, new)
        turn = turn[digests[turn] != 0]
        led = int((turn < old.num_rows).sum())
        first = first_equal(digests[turn, None])
        places = np.unique(first)  # rows that show their text first

        def index(rows: np.ndarray) -> Ask:
            ask = text.index(turn[places[rows]], self.min_jaccard)
            return lambda asking: ask(turn[places[asking]])

        found = leaders(len(places), int((places < led).sum()), index)
        leader = turn[places[found[np.searchsorted(places, first)]][led:]]
        like = pa.array(jaccard(text.piece_P, text.offsets, turn[led:], leader), pa.float32())
        names = both(old, new, "group", "uid").take(pa.array(leader))
        return scatter(new.num_rows, turn[led:] - old.num_rows, {"group": names, "jaccard": like})

    def query(self, corpus: pa.Table, queries: pa.Table, exclude: Sequence[str | None]) -> pa.Table:
        """A row that is left out is represented by the members of its group, under the group's name."""
        left_out = pc.is_in(corpus["group"], pa.array([uid for uid in exclude if uid is not None], pa.string()))
        corpus = corpus.filter(pc.or_(pa.array(stand_in(corpus)), left_out))
        corpus = corpus.take(in_order(corpus))
        text = _pieces(corpus, queries)
        uid_N, group_N = (np.array(corpus[name].to_pylist(), object) for name in ("uid", "group"))
        stands_N, left_out_Q = stand_in(corpus), np.array(list(exclude), object)
        asked = np.arange(corpus.num_rows, corpus.num_rows + queries.num_rows)

        def standing() -> Pairs:
            for asking, rows in text.index(np.arange(corpus.num_rows), self.min_jaccard)(asked):
                stands = stands_N[rows] | (group_N[rows] == left_out_Q[asking])
                valid = (uid_N[rows] != left_out_Q[asking]) & stands
                yield asking[valid], rows[valid]

        found = earliest(standing(), queries.num_rows, corpus.num_rows)
        hit = np.flatnonzero(found >= 0)
        like = jaccard(text.piece_P, text.offsets, asked[hit], found[hit])
        groups = pa.array(group_N[found[hit]].tolist(), pa.string())
        return scatter(len(found), hit, {"group": groups, "jaccard": pa.array(like, pa.float32())})


def _pieces(existing: pa.Table, new: pa.Table) -> Pieces:
    """The pieces of the rows of both tables, one below the other."""
    lists, buckets = (both(existing, new, name) for name in ("pieces", "buckets"))
    offsets = np.concatenate([[0], np.cumsum(list_lengths(lists))])
    return Pieces(buckets.flatten().to_numpy().reshape(-1, BUCKETS), lists.flatten().to_numpy(), offsets)
