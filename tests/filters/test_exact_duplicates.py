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


def test_a_query_without_its_original_finds_only_others() -> None:
    queries = corpus([("q", "0000", False, "x"), ("r", "0000", False, "x"), ("s", "0000", False, None)])
    assert ExactDuplicates().query(OLD, queries, [None, "o", None])["group"].to_pylist() == ["o", None, None]
