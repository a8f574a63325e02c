"""Text frequency: ranks go on over increments, counts say what was known, a cap by rank keeps as many as it says."""

from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from filters.text_frequency import TextFrequency

Row = tuple[str | None, str, str]  # text, image, host


def table(rows: list[Row], increment: int = 0, trusted: bool = False) -> pa.Table:
    uids = [f"{increment}{number:03d}" for number in range(len(rows))]
    texts, images, hosts = ([row[place] for row in rows] for place in range(3))
    columns: dict[str, Any] = {"uid": uids, "increment": [str(increment)] * len(uids), "trusted": [trusted] * len(uids)}
    columns |= {"text": texts, "sha256": images, "url": [f"http://{host}/x.jpg" for host in hosts]}
    kinds = {"uid": pa.string(), "increment": pa.string(), "trusted": pa.bool_()}
    return TextFrequency().condense(pa.table({n: pa.array(v, kinds.get(n, pa.string())) for n, v in columns.items()}))


def answers(existing: pa.Table, new: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in TextFrequency().reduce(existing, new).to_pylist()]


FIRST: list[Row] = [("A dog", "x", "a.test"), ("a dog!", "x", "b.test"), (None, "z", "a.test"), ("Cats", "y", "a.test")]


def test_rank_counts_what_stands_before_and_the_others_all_there_is() -> None:
    assert answers(table([]), table(FIRST)) == [(0, 2, 1, 2), (1, 2, 1, 2), (None,) * 4, (0, 1, 1, 1)]
    later = table([("A DOG", "y", "b.test"), ("new", "x", "c.test")], 1)
    assert answers(table(FIRST), later) == [(2, 3, 2, 2), (0, 1, 1, 1)]
    two = pa.concat_tables([table([("dog", "x", "h")], 1), table([("dog", "x", "h")], 0, trusted=True)])
    assert [rank for rank, *_ in answers(table([]), two)] == [1, 0], "by increment, trusted first, uid"


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=9), min_size=1, max_size=3), st.integers(1, 4))
def test_a_cap_by_rank_keeps_as_many_of_each_text(increments: list[list[str]], most: int) -> None:
    kept: list[str] = []
    before = table([])
    for number, texts in enumerate(increments):
        new = table([(text, str(place), "h") for place, text in enumerate(texts)], number)
        ranks = [rank for rank, *_ in answers(before, new)]
        kept += [text for text, rank in zip(texts, ranks, strict=True) if rank is not None and rank < most]
        before = pa.concat_tables([before, new])
    told = [text for texts in increments for text in texts if text]
    assert sorted(kept) == sorted(text for text in set(told) for _ in range(min(most, told.count(text))))


def test_a_query_counts_itself_and_not_its_original() -> None:
    queries = table([("a dog", "x", "b.test"), ("a dog", "q", "q.test"), ("other", "x", "a.test"), (None, "x", "h")], 1)
    found = TextFrequency().query(table(FIRST), queries, ["0000", None, None, None]).to_pylist()
    assert [tuple(row.values()) for row in found] == [(1, 2, 1, 1), (2, 3, 2, 3), (0, 1, 1, 1), (None,) * 4]
