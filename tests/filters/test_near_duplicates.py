"""Near duplicates: leaders found fast are those of the obvious loop, and later increments change nothing."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.exact_duplicates import ExactDuplicates
from filters.hamming import leaders
from filters.near_duplicates import NearDuplicates
from filters.reduce import run_reducers
from pairs.errors import PairmillError
from pairs.workspace import Workspace
from tests.filters.corpus import add, contents, folder, numbers, uid_of

SCORES = {"image_hash": folder("image_hash")}
NEAR = {"near_duplicates": NearDuplicates()}


def obvious(values: list[int], known: int, radius: int) -> list[int]:
    """The oracle: each value joins the first leader within the radius, or leads."""
    found = list(range(known))
    for row in range(known, len(values)):
        near = (
            lead for lead in range(row) if found[lead] == lead and (values[lead] ^ values[row]).bit_count() <= radius
        )
        found.append(next(near, row))
    return found


@st.composite
def clouds(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Distinct values around a few centres, so that radii matter; how many of the first are leaders; a radius."""
    radius = draw(st.integers(0, 12))
    centres = draw(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
    flips = st.lists(st.integers(0, 63), max_size=radius + 3)
    points = st.tuples(st.sampled_from(centres), flips).map(lambda p: p[0] ^ sum({1 << bit for bit in p[1]}))
    return draw(st.lists(points, max_size=25, unique=True)), draw(st.integers(0, 1)), radius


@given(clouds(), st.integers(1, 9))
def test_leaders_are_those_of_the_obvious_loop(cloud: tuple[list[int], int, int], block: int) -> None:
    values, known, radius = cloud
    known = min(known, len(values))
    assert leaders(np.array(values, np.uint64), known, radius, block).tolist() == obvious(values, known, radius)


def test_many_values_over_many_blocks() -> None:
    chance = np.random.default_rng(0)
    centres = chance.integers(0, 2**64, 300, dtype=np.uint64)
    bit = np.uint64(1) << chance.integers(0, 64, (1500, 6)).astype(np.uint64)
    values = np.unique(np.concatenate([centres, np.bitwise_xor.reduce(bit, axis=1) ^ chance.choice(centres, 1500)]))
    chance.shuffle(values)
    for radius in (4, 6):
        assert leaders(values, 0, radius, 64).tolist() == obvious(values.tolist(), 0, radius)


def hashes(values: list[int | None]) -> dict[str, Any]:
    return {"image_hash": {"phash": pa.array([None if v is None else f"{v:016x}" for v in values], pa.string())}}


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


@settings(max_examples=8)
@given(st.lists(st.lists(st.integers(0, 63), max_size=8), min_size=1, max_size=3))
def test_a_later_increment_changes_no_answer_and_a_cut_run_ends_the_same(increments: list[list[int]]) -> None:
    workspace = Workspace.open(f"memory://{np.random.default_rng().integers(2**60)}", create=True)
    reducers = {"near_duplicates": NearDuplicates(max_distance=1), "exact_duplicates": ExactDuplicates()}
    refs, before = [], {}
    for i, values in enumerate(increments):
        half = len(values) // 2
        for index, part in enumerate((values[:half], values[half:])):
            members = range(100 * i + 10 * index, 100 * i + 10 * index + len(part))
            refs.append(add(workspace, "web", f"{i:04d}", members, hashes(list(part)), index))
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


def table(uids: list[str], values: list[int], groups: list[str] | None = None) -> pa.Table:
    columns = {"uid": uids, "source": ["web"] * len(uids), "increment": ["0000"] * len(uids)}
    columns |= {"trusted": [False] * len(uids), "image_hash.phash": [f"{v:016x}" for v in values]}
    return pa.table(columns | ({"group": groups, "distance": [0] * len(uids)} if groups else {}))


def test_a_query_leaves_the_named_row_out_but_not_its_group() -> None:
    corpus = table(["a", "b", "c"], [0, 0b11, 2**40 - 1], ["a", "a", "c"])
    queries = table(["q"] * 4, [0b1, 0b1, 2**40 - 2, 2**40 - 2])
    found = NearDuplicates(max_distance=2).query(corpus, queries, [None, "a", None, "c"])
    assert found["group"].to_pylist() == ["a", "a", "c", None]
    assert found["distance"].to_pylist() == [1, 1, 1, None]
    far = NearDuplicates(max_distance=0).query(corpus, queries, [None, None, None, None])
    assert far["group"].to_pylist() == [None] * 4


def test_a_radius_without_meaning_and_a_column_without_hashes_are_refused() -> None:
    with pytest.raises(PairmillError, match="max_distance"):
        NearDuplicates(max_distance=40)
    words = table(["a"], [0]).set_column(4, "image_hash.phash", pa.array(["a long word"]))
    with pytest.raises(PairmillError, match="16 hex digits"):
        NearDuplicates().reduce(table(["b"], [0], ["b"]), words)
