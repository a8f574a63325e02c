"""Exact duplicates: one group for equal bytes, led by the earliest pair."""

import pyarrow as pa

from filters.exact_duplicates import ExactDuplicates


def corpus(rows: list[tuple[str, str, bool, str | None]]) -> pa.Table:
    uid, increment, trusted, sha256 = zip(*rows, strict=True)
    named = {"uid": uid, "source": ["web"] * len(rows), "increment": increment, "trusted": trusted, "sha256": sha256}
    return pa.table({name: list(values) for name, values in named.items()})


OLD = corpus([("o", "0000", False, "x")]).append_column("group", pa.array(["o"]))


def test_the_leader_is_the_earliest_then_trusted_then_by_uid() -> None:
    new = corpus([("c", "0001", False, "x"),
                  ("b", "0001", False, "y"), ("d", "0001", True, "y"), ("a", "0001", False, "z"),
                  ("e", "0001", False, None), ("g", "0002", True, "z")])  # fmt: skip
    assert ExactDuplicates().reduce(OLD, new)["group"].to_pylist() == ["o", "d", "d", "a", None, "a"]


def test_equal_pixels_of_other_bytes_are_a_group_of_their_own() -> None:
    pixels, old = "image_hash.sha256", OLD.append_column("pixel_group", pa.array(["o"]))
    old = old.append_column(pixels, pa.array(["p"]))
    new = corpus([("a", "0001", False, "y"), ("b", "0001", False, "x"), ("c", "0001", False, "z")])
    new = new.append_column(pixels, pa.array(["p", "q", None], pa.string()))
    found = ExactDuplicates(pixels=pixels).reduce(old, new).to_pydict()
    assert found == {"group": ["a", "o", "c"], "pixel_group": ["o", "b", None]}
    told = ExactDuplicates(pixels=pixels).query(old, new, [None] * 3).to_pydict()
    assert told == {"group": [None, "o", None], "pixel_group": ["o", None, None]}


def test_a_query_without_its_original_finds_only_others() -> None:
    queries = corpus([("q", "0000", False, "x"), ("r", "0000", False, "x"), ("s", "0000", False, None)])
    assert ExactDuplicates().query(OLD, queries, [None, "o", None])["group"].to_pylist() == ["o", None, None]
