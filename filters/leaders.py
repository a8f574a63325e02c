"""Groups of rows by their leaders: each row in turn joins the earliest leader that is near, or becomes a leader.

Rows come in the order increment, trusted first, uid (docs/decisions/0002), so there is no chaining, and what comes
later changes no earlier answer. What "near" means is the caller's: an index of some rows that yields the near ones.
Rows are asked block by block: against all leaders so far, then inside the block; memory holds one block's pairs.
"""

from collections.abc import Callable, Collection, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.columns import one_chunk

Pairs = Iterator[tuple[np.ndarray, np.ndarray]]
Ask = Callable[[np.ndarray], Pairs]  # rows that ask → (place among those that ask, place among the indexed rows)
MakeIndex = Callable[[np.ndarray], Ask]  # rows to be indexed → what answers for them; a pair may come more than once
PIECE = 1 << 21  # candidates held at a time


def in_order(table: pa.Table) -> np.ndarray:
    """Row numbers in the order in which reducers give out leaders: increment, trusted first, uid."""
    keys = table.select(["increment", "uid"]).append_column("later", pc.cast(pc.invert(table["trusted"]), pa.int8()))
    order = pc.sort_indices(keys, [("increment", "ascending"), ("later", "ascending"), ("uid", "ascending")])
    return order.to_numpy().astype(np.int64)


def turns(existing: pa.Table, new: pa.Table) -> np.ndarray:
    """Row numbers of both tables, one below the other, in the order in which leaders are given out."""
    return np.concatenate([in_order(existing), existing.num_rows + in_order(new)])


def leading(table: pa.Table, groups: Collection[str], without: Collection[str] = ()) -> pa.Table:
    """The rows that lead a group of one of the columns `groups`, and the members of the groups that `without` leads."""
    stays = np.zeros(table.num_rows, bool)
    left_out = pa.array(list(without), pa.string())
    for name in groups:
        found = pc.or_kleene(pc.equal(table[name], table["uid"]), pc.is_in(table[name], left_out))
        stays |= pc.fill_null(found, False).to_numpy(zero_copy_only=False)
    return table.filter(pa.array(stays))


def stand_in(table: pa.Table, group: str = "group") -> np.ndarray:
    """Which rows represent their group: its leader, or all members where the table has no leader: it is forgotten."""
    leads = pc.fill_null(pc.equal(table[group], table["uid"]), False)
    led = pc.is_in(table[group], one_chunk(table[group].filter(leads)))
    found = pc.and_(table[group].is_valid(), pc.or_(leads, pc.invert(led)))
    return found.to_numpy().astype(bool)


def both(existing: pa.Table, new: pa.Table, column: str, later: str = "") -> pa.Array:
    """A column of two tables, one below the other; of the second it is `later`, if that is told."""
    return pa.concat_arrays([one_chunk(existing[column]), one_chunk(new[later or column])])


def scatter(count: int, rows: np.ndarray, columns: dict[str, pa.Array]) -> pa.Table:
    """A table of `count` rows with the values at `rows` and null elsewhere."""
    take = np.full(count, -1, np.int64)
    take[rows] = np.arange(len(rows))
    places = pa.array(take, mask=take < 0)
    return pa.table({name: values.take(places) for name, values in columns.items()})


def expand(first: np.ndarray, counts: np.ndarray, most: int = PIECE) -> Pairs:
    """(place, element) for the `counts[place]` elements from `first[place]` on, about `most` at a time."""
    hit = np.flatnonzero(counts)
    number = np.cumsum(counts[hit]) // most
    for piece in np.split(hit, np.flatnonzero(np.diff(number)) + 1) if len(hit) else []:
        place = np.repeat(piece, counts[piece])
        ends = np.cumsum(counts[piece])
        yield place, first[place] + np.arange(len(place)) - np.repeat(ends - counts[piece], counts[piece])


def first_equal(values_NW: np.ndarray) -> np.ndarray:
    """For each row the first row with the same words."""
    order = np.lexsort(values_NW.T)  # stable: of equal rows the first stands first
    ordered = values_NW[order]
    opens = np.ones(len(order), bool)
    opens[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[opens][np.cumsum(opens) - 1]
    return first


def leaders(count: int, known: int, index: MakeIndex, block: int = 2048) -> np.ndarray:
    """For each of `count` rows the row of its leader; the first `known` rows are leaders already.

    Leaders lie in a large index that is rebuilt when the small one of recent leaders has grown to a quarter of it, so
    a row is indexed a few times, not once per block. Blocks grow with the large index, to rebuild the small one less.
    """
    leader = np.arange(count)
    main_rows, recent_rows = np.arange(known), np.arange(0)
    main, recent = index(main_rows), index(recent_rows)
    start = known
    while start < count:
        rows = np.arange(start, min(start + max(block, len(main_rows) // 64), count))
        for ask, places in ((main, main_rows), (recent, recent_rows)):
            asking = rows[leader[rows] == rows]  # all of main is earlier than all of recent
            found = earliest(ask(asking), len(asking), len(places))
            leader[asking[found >= 0]] = places[found[found >= 0]]
        asking = rows[leader[rows] == rows]
        leader[asking] = asking[_inside(asking, index, block)]
        recent_rows = np.concatenate([recent_rows, rows[leader[rows] == rows]])
        if len(recent_rows) > max(4 * block, len(main_rows) // 4):
            main_rows, recent_rows = np.concatenate([main_rows, recent_rows]), np.arange(0)
            main = index(main_rows)
        recent, start = index(recent_rows), start + len(rows)
    return leader


def earliest(found: Pairs, asking: int, none: int) -> np.ndarray:
    """For each of the `asking` the smallest place below `none` that is near, or -1."""
    first = np.full(asking, none, np.int64)
    for place, row in found:
        np.minimum.at(first, place, row)
    return np.where(first == none, -1, first)


def _inside(rows: np.ndarray, index: MakeIndex, block: int) -> np.ndarray:
    """The place of the leader of each of the `rows` of a block, to none of which an earlier leader is near."""
    if len(rows) > block:

        def within(some: np.ndarray) -> Ask:
            ask = index(rows[some])
            return lambda asking: ask(rows[asking])

        return leaders(len(rows), 0, within, block)
    leader, size = np.arange(len(rows)), len(rows)
    pairs = [(later * size + found)[found < later] for later, found in index(rows)(rows)]
    near = np.unique(np.concatenate(pairs)) if pairs else np.arange(0)
    later, earlier = np.divmod(near, max(size, 1))
    values, starts = np.unique(later, return_index=True)
    ends = np.append(starts, len(later))[1:]
    for row, start, end in zip(values.tolist(), starts.tolist(), ends.tolist(), strict=True):
        ahead = earlier[start:end]
        ahead = ahead[leader[ahead] == ahead]
        leader[row] = ahead[0] if len(ahead) else row
    return leader
