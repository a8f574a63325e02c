"""Near duplicates: leaders found fast are those of the obvious loop, and later increments change nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters import hamming
from filters.exact_duplicates import ExactDuplicates
from filters.hamming import HammingIndex, leaders
from filters.leaders import first_equal
from filters.lookup import load_reducer
from filters.near_duplicates import NearDuplicates
from filters.reduce import run_reducers
from pairs.errors import PairmillError
from pairs.workspace import Workspace
from tests.filters.corpus import add, contents, folder, numbers, uid_of

SCORES = {"image_hash": folder("image_hash")}
NEAR = {"near_duplicates": NearDuplicates()}
Value = tuple[int, ...]  # the words of a row: the hash that is looked up, then those that confirm


def near(a: Value, b: Value, radius: int, confirm: int) -> bool:
    bits = [(x ^ y).bit_count() for x, y in zip(a, b, strict=True)]
    return bits[0] <= radius and sum(bits[1:]) <= confirm


def obvious(values: list[Value], known: int, radius: int, confirm: int = 0) -> list[int]:
    """The oracle: each value joins the first leader that is near, or leads."""
    found = list(range(known))
    for row in range(known, len(values)):
        ahead = (i for i in range(row) if found[i] == i and near(values[i], values[row], radius, confirm))
        found.append(next(ahead, row))
    return found


@st.composite
def clouds(draw: st.DrawFn) -> tuple[list[Value], int, int, int]:
    """Distinct values of one to three words around a few centres, so that radii matter; how many of the first are
    leaders; the two radii."""
    radius, confirm, width = draw(st.integers(0, 12)), draw(st.integers(0, 20)), draw(st.integers(0, 2))
    word = st.integers(0, 2**64 - 1)
    centres = draw(st.lists(st.tuples(*[word] * (1 + width)), min_size=1, max_size=3))

    def around(most: int) -> st.SearchStrategy[int]:
        return st.lists(st.integers(0, 63), max_size=most).map(lambda bits: sum({1 << bit for bit in bits}))

    flips = st.tuples(around(radius + 3), *[around(confirm + 3)] * width)
    points = st.tuples(st.sampled_from(centres), flips).map(lambda p: tuple(a ^ b for a, b in zip(*p, strict=True)))
    return draw(st.lists(points, max_size=25, unique=True)), draw(st.integers(0, 1)), radius, confirm


def array(values: list[Value]) -> np.ndarray:
    return np.array(values, np.uint64).reshape(len(values), len(values[0]) if values else 1)


@given(clouds(), st.integers(1, 9))
def test_leaders_are_those_of_the_obvious_loop(cloud: tuple[list[Value], int, int, int], block: int) -> None:
    values, known, radius, confirm = cloud
    known = min(known, len(values))
    found = leaders(array(values), known, radius, confirm, block)
    assert found.tolist() == obvious(values, known, radius, confirm)


@pytest.mark.parametrize("radius", range(13))
def test_the_tables_of_three_chunks_find_all(radius: int) -> None:
    chance = np.random.default_rng(radius)
    values = chance.integers(0, 2**64, (300, 1), dtype=np.uint64)
    turned = [sum(1 << int(bit) for bit in chance.choice(64, radius, replace=False)) for _ in range(300)]
    queries = values ^ np.array(turned, np.uint64)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hamming, "MANY_VALUES", 0)
        found = {pair for a, b in HammingIndex(values).within(queries, radius) for pair in zip(a, b, strict=True)}
    assert found == {(row, row) for row in range(300)}


def test_many_values_over_many_blocks() -> None:
    chance = np.random.default_rng(0)
    centres = chance.integers(0, 2**64, (150, 2), dtype=np.uint64)
    bit = np.uint64(1) << chance.integers(0, 64, (500, 2, 6)).astype(np.uint64)
    values = np.concatenate([centres, np.bitwise_xor.reduce(bit, axis=2) ^ chance.choice(centres, 500)])
    values = np.unique(values, axis=0)
    chance.shuffle(values)
    for radius, confirm in ((4, 6), (6, 4), (8, 8)):
        expected = obvious([tuple(row) for row in values.tolist()], 0, radius, confirm)
        for block in (2, 64):  # blocks grow with the leaders, and are then divided
            assert leaders(values, 0, radius, confirm, block).tolist() == expected
    short = np.unique(values[:, :1])[:, None]
    assert leaders(short, 0, 6, block=64).tolist() == obvious([tuple(row) for row in short.tolist()], 0, 6)


def test_scattered_bits_are_as_far_apart_and_each_chunk_has_two_of_every_row() -> None:
    values = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    found = hamming.scattered(values)
    assert (hamming.distance(found[1:], found[:-1]) == hamming.distance(values[1:], values[:-1])).all()
    rows = hamming.scattered(np.array([0xFF << 8 * row for row in range(8)], np.uint64))
    assert {(int(row) >> 16 * chunk & 0xFFFF).bit_count() for row in rows for chunk in range(4)} == {2}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=12))
def test_the_first_equal_row(values: list[Value]) -> None:
    values_NW = np.array(values, np.uint64).reshape(-1, 2)
    assert first_equal(values_NW).tolist() == [values.index(value) for value in values]


def digits(values: list[int | None], words: int = 1) -> pa.Array:
    return pa.array([None if v is None else f"{v:0{16 * words}x}" for v in values], pa.string())


def hashes(values: list[int | None], confirm: list[int | None] | None = None) -> dict[str, Any]:
    """The table of `image_hash`; the long hash is 0 where it isn't told and there is a short one."""
    long = confirm or [None if v is None else 0 for v in values]
    return {"image_hash": {"dhash": digits(values), "dhash_256": digits(long, 4)}}


def answers(workspace: Workspace, folder_: str, *refs: Any) -> list[tuple[str | None, int | None]]:
    tables = [workspace.store.read_table(ref.beside(folder_)) for ref in refs]
    return [(r["group"], r["distance"]) for table in tables for r in table.to_pylist()]


def test_a_trusted_pair_leads_and_a_null_hash_has_no_group(workspace: Workspace) -> None:
    web = add(workspace, "web", "0000", range(3), hashes([0b111, None, 0xFFFF_0000_FFFF_0000]))
    clean = add(workspace, "clean", "0000", (one := numbers(1)), hashes([0]))
    found = run_reducers(workspace.store, NEAR, {"web": [web], "clean": [clean]}, SCORES, ["clean"])
    lead = uid_of("clean", one[0])
    own = (uid_of("web", 2), 0)
    assert answers(workspace, found["near_duplicates"], clean, web) == [(lead, 0), (lead, 3), (None, None), own]


def two(rows: Sequence[Value]) -> dict[str, Any]:
    return hashes([row[0] for row in rows], [row[1] for row in rows])


@settings(max_examples=8)
@given(st.lists(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 7)), max_size=8), min_size=1, max_size=3))
def test_a_later_increment_changes_no_answer_and_a_cut_run_ends_the_same(increments: list[list[Value]]) -> None:
    workspace = Workspace.open(f"memory://{np.random.default_rng().integers(2**60)}", create=True)
    near_ = NearDuplicates(max_distance=1, confirm_distance=1)
    reducers = {"near_duplicates": near_, "exact_duplicates": ExactDuplicates()}
    refs: list[Any] = []
    before: dict[str, bytes] = {}
    for i, values in enumerate(increments):
        half = len(values) // 2
        for index, part in enumerate((values[:half], values[half:])):
            members = range(100 * i + 10 * index, 100 * i + 10 * index + len(part))
            refs.append(add(workspace, "web", f"{i:04d}", members, two(part), index))
        found = run_reducers(workspace.store, reducers, {"web": refs}, SCORES, [])
        after = {p: data for p, data in contents(workspace.store).items() if not p.endswith("order.json")}
        assert {path: after[path] for path in before} == before
        before = after
    everything = contents(workspace.store)
    for lost in refs:
        workspace.store.delete(lost.beside(found["near_duplicates"]))
        assert run_reducers(workspace.store, reducers, {"web": refs}, SCORES, []) == found
        assert contents(workspace.store) == everything
    workspace.store.delete("", recursive=True)


def table(uids: list[str], rows: list[Value], groups: list[str | None] | None = None) -> pa.Table:
    """Rows of (dhash, dhash_256)."""
    text = {"uid": uids, "source": ["web"] * len(uids), "increment": ["0000"] * len(uids)}
    columns: dict[str, Any] = {name: pa.array(values, pa.string()) for name, values in text.items()}
    short, long = [list(values) for values in zip(*rows, strict=True)] if rows else ([], [])
    columns |= {"trusted": pa.array([False] * len(uids), pa.bool_()), "image_hash.dhash": digits(short)}
    columns |= {"image_hash.dhash_256": digits(long, 4)}
    made = {"group": pa.array(groups or [], pa.string()), "distance": pa.array([0] * len(uids), pa.int32())}
    return pa.table(columns | (made if groups or not uids else {}))


def groups_of(reducer: NearDuplicates, rows: list[Any], existing: pa.Table | None = None) -> list[Any]:
    uids = [chr(ord("a") + i) for i in range(len(rows))]
    return reducer.reduce(existing or table([], []), table(uids, rows))["group"].to_pylist()


def test_equal_hashes_with_other_long_hashes_share_no_answer() -> None:
    far, ones = 2**43 - 1, 2**256 - 1  # 43 bits
    rows = [(5, 0), (5, far), (5, 0), (5, ones), (4, far), (5, 1)]
    assert groups_of(NearDuplicates(), rows) == ["a", "b", "a", "d", "b", "a"]
    assert groups_of(NearDuplicates(confirm_distance=43), rows) == ["a", "a", "a", "d", "a", "a"]
    assert groups_of(NearDuplicates(confirm=None), rows) == ["a"] * 6
    assert groups_of(NearDuplicates(max_distance=0), rows) == ["a", "b", "a", "d", "e", "a"]
    assert groups_of(NearDuplicates(), rows[:2], table(["old"], [(5, far)], ["old"])) == ["a", "old"]


def test_a_row_that_lacks_either_hash_has_no_group() -> None:
    rows = [(None, 0), (0, None), (0, 0), (None, None), (0, 0)]
    assert groups_of(NearDuplicates(), rows) == [None, None, "c", None, "c"]
    assert groups_of(NearDuplicates(confirm=None), rows) == [None, "b", "b", None, "b"]
    assert groups_of(NearDuplicates(), rows[:2]) == [None, None]


# Bits of the long hash are flipped in one place each, so radii of a few bits tell rows apart.
rows_ = st.lists(
    st.tuples(
        st.none() | st.sampled_from([0, 1, 3, 7, 2**64 - 1]), st.none() | st.sampled_from([0, 1, 2**70 + 1, 2**256 - 1])
    ),
    max_size=12,
)


@settings(max_examples=30)
@given(rows_, rows_, st.integers(0, 2), st.integers(0, 2))
def test_a_reducer_and_its_queries_answer_as_the_obvious_loop(
    rows: list[Any], asked: list[Any], radius: int, confirm: int
) -> None:
    reducer = NearDuplicates(max_distance=radius, confirm_distance=confirm)
    groups = groups_of(reducer, rows)
    known = [i for i, row in enumerate(rows) if None not in row]
    expected = obvious([rows[i] for i in known], 0, radius, confirm)
    names = {i: chr(ord("a") + known[lead]) for i, lead in zip(known, expected, strict=True)}
    assert groups == [names.get(i) for i in range(len(rows))]
    corpus = table([chr(ord("a") + i) for i in range(len(rows))], rows, groups)
    found = reducer.query(corpus, table(["q"] * len(asked), asked), [None] * len(asked))["group"].to_pylist()
    leads = [i for i in known if names[i] == chr(ord("a") + i)]
    for row, group in zip(asked, found, strict=True):
        matching = (i for i in leads if None not in row and near(rows[i], row, radius, confirm))
        assert group == names.get(next(matching, -1))


def test_a_query_leaves_the_named_row_out_but_not_its_group() -> None:
    corpus = table(["a", "b", "c"], [(0, 0), (0b11, 0), (2**40 - 1, 0)], ["a", "a", "c"])
    queries = table(["q"] * 4, [(0b1, 0), (0b1, 0), (2**40 - 2, 0), (2**40 - 2, 0)])
    found = NearDuplicates(max_distance=2).query(corpus, queries, [None, "a", None, "c"])
    assert found["group"].to_pylist() == ["a", "a", "c", None]
    assert found["distance"].to_pylist() == [1, 1, 1, None]
    far = NearDuplicates(max_distance=0).query(corpus, queries, [None, None, None, None])
    assert far["group"].to_pylist() == [None] * 4
    other = table(["q"] * 2, [(0b1, 2**43 - 1), (0b1, 2**42 - 1)])
    assert NearDuplicates(max_distance=2).query(corpus, other, ["a", "a"])["group"].to_pylist() == [None, "a"]


@pytest.mark.parametrize(
    ("chosen", "word"),
    [
        ({"max_distance": 40}, "max_distance"),
        ({"confirm_distance": -1}, "0 or more"),
        ({"confirm": None, "confirm_distance": 20}, "without one"),
    ],
)
def test_settings_without_meaning_are_refused(chosen: dict[str, Any], word: str) -> None:
    with pytest.raises(PairmillError, match=word):
        load_reducer("near_duplicates", chosen)


def test_confirm_null_and_other_columns_change_what_is_needed() -> None:
    assert load_reducer("near_duplicates", {}).needs == ("image_hash.dhash", "image_hash.dhash_256")
    assert load_reducer("near_duplicates", {"confirm": None}).needs == ("image_hash.dhash",)
    chosen = {"hash": "image_hash.phash", "confirm": "image_hash.phash_256", "confirm_distance": 20}
    assert load_reducer("near_duplicates", chosen).needs == ("image_hash.phash", "image_hash.phash_256")


def test_columns_without_hashes_are_refused() -> None:
    def with_words(place: int, words: list[str]) -> pa.Table:
        one = table(["a", "b"], [(0, 0), (0, 0)])
        return one.set_column(place, one.column_names[place], pa.array(words))

    empty = table([], [])
    for values in (["a long word", "another"], ["0" * 64] * 2, ["0" * 16, "x" * 16]):
        with pytest.raises(PairmillError, match=r"16 hex digits \(64 bits\)"):
            NearDuplicates().reduce(empty, with_words(4, values))
    for values in (["0" * 64, "0" * 32], ["0" * 60] * 2, ["", "0" * 64]):
        with pytest.raises(PairmillError, match=r"near_duplicates\.confirm names"):
            NearDuplicates().reduce(empty, with_words(5, values))
    with pytest.raises(PairmillError, match="below the 64 bits"):
        NearDuplicates(confirm="image_hash.dhash", confirm_distance=64).reduce(empty, table(["a"], [(0, 0)]))
