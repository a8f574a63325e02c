"""Every reducer there is, found by its module: increments change no earlier answer, a cut run ends the same, Ray and
canaries change no byte. What the answers mean stands in each reducer's own test."""

import contextlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.session import ray_session
from filters import parts, semantic_duplicates
from filters.base import Reducer
from filters.lookup import load_reducer, names
from filters.reduce import ask, run_reducers
from pairs.shard import ShardRef, rewrite_shard
from pairs.store import table_metadata
from pairs.workspace import Workspace
from tests.filters.corpus import add, contents, folder, uid_of

SETTINGS: dict[str, dict[str, Any]] = {
    "exact_duplicates": {"pixels": "image_hash.sha256"},
    "near_duplicates": {"max_distance": 2, "confirm_distance": 2},
    "semantic_duplicates": {"epsilon": 0.05, "cluster_rows": 8},
}
SCORES = {"image_hash": folder("image_hash"), "clip": folder("clip")}
REDUCERS = {name: load_reducer(name, SETTINGS.get(name, {})) for name in names(Reducer)}
WORDS = (
    "a red boat",
    "a red boat",
    "A red  boat!",
    "boats on the lake in the evening",
    "boats on a lake in the evening",
    "",
)
DIRECTIONS = np.random.default_rng(0).normal(size=(6, 8))


def scored(values: Sequence[int | None]) -> dict[str, Any]:
    """Score tables whose rows with near values look alike; None is a row that nothing could be measured of."""
    digits = [[None if v is None else f"{(v << 1) | (v >> 3):0{size}x}" for v in values] for size in (16, 64)]
    hashes = dict(zip(("dhash", "dhash_256"), (pa.array(d, pa.string()) for d in digits), strict=True))
    hashes["sha256"] = pa.array([None if v is None else f"{v % 5:064x}" for v in values], pa.string())
    vectors = [None if v is None else DIRECTIONS[v % 6] + 0.02 * (v // 6) for v in values]
    half = [None if v is None else (v / np.linalg.norm(v)).astype(np.float16) for v in vectors]
    return {"image_hash": hashes, "clip": {"image": pa.array(half, pa.list_(pa.float16()))}}


def fill(workspace: Workspace, increment: int, values: Sequence[int | None]) -> list[ShardRef]:
    """Two shards of an increment."""
    half, refs = len(values) // 2, []
    for index, some in enumerate((values[:half], values[half:])):
        members = range(100 * increment + 30 * index, 100 * increment + 30 * index + len(some))
        texts = [[WORDS[(v or 0) % len(WORDS)]] for v in some]
        refs.append(add(workspace, "web", f"{increment:04d}", members, scored(some), index, texts))
    return refs


def test_all_are_tried() -> None:
    assert {"exact_duplicates", "near_duplicates", "semantic_duplicates", "text_duplicates", "text_frequency"} <= set(
        REDUCERS
    )


@settings(max_examples=5)
@given(st.lists(st.lists(st.none() | st.integers(0, 15), max_size=9), min_size=1, max_size=3))
def test_a_later_increment_changes_no_answer_and_a_cut_run_ends_the_same(increments: list[list[int | None]]) -> None:
    workspace = Workspace.open(f"memory://{uuid.uuid4().hex}", create=True)
    refs: list[ShardRef] = []
    before: dict[str, bytes] = {}
    for number, values in enumerate(increments):
        refs += fill(workspace, number, values)
        found = run_reducers(workspace.store, REDUCERS, {"web": refs}, SCORES, [])
        after = {path: data for path, data in contents(workspace.store).items() if not path.endswith("order.json")}
        assert {path: after[path] for path in before} == before
        before = after
    everything = contents(workspace.store)
    for lost in refs[:: max(1, len(refs) // 2)]:
        for place in found.values():
            workspace.store.delete(lost.beside(place))
        assert run_reducers(workspace.store, REDUCERS, {"web": refs}, SCORES, []) == found
        assert contents(workspace.store) == everything
    workspace.store.delete("", recursive=True)


@settings(max_examples=5)
@given(
    st.lists(st.none() | st.integers(0, 15), min_size=2, max_size=12),
    st.lists(st.none() | st.integers(0, 15), min_size=1, max_size=2),
)
def test_a_query_is_answered_as_a_pair_of_the_next_increment(values: list[int | None], asked: list[int | None]) -> None:
    """Each query alone is what a later increment of one pair would be, and asking changes nothing."""
    workspace = Workspace.open(f"memory://{uuid.uuid4().hex}", create=True)
    refs = fill(workspace, 0, values)
    found = run_reducers(workspace.store, REDUCERS, {"web": refs}, SCORES, [])
    asking = fill(workspace, 1, asked)
    everything = contents(workspace.store)
    told = {}
    for name, one in REDUCERS.items():
        given = (workspace.store, name, one, {"web": refs}, SCORES | found, [])
        table, unmeasured = ask(*given, {"canaries": asking}, [None] * len(asked))
        assert len(unmeasured) == table.num_rows == len(asked)
        told[name] = table.to_pylist()
    assert contents(workspace.store) == everything
    for place, value in enumerate(asked):
        alone = Workspace.open(f"memory://{uuid.uuid4().hex}", create=True)
        shards = fill(alone, 0, values) + fill(alone, 1, [value])
        folders = run_reducers(alone.store, REDUCERS, {"web": shards}, SCORES, [])
        for name in REDUCERS:
            row = alone.store.read_table(shards[-1].beside(folders[name])).drop_columns("uid").to_pylist()[0]
            own = uid_of("web", 130)
            expected = {column: None if v == own else v for column, v in row.items()}
            if "group" in row and expected["group"] is None:  # it would lead: nothing that is there is near
                expected = {column: expected[column] if column.endswith("group") else None for column in row}
            assert told[name][place] == expected, name
        alone.store.delete("", recursive=True)
    workspace.store.delete("", recursive=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "SPREAD_BYTES", 0)
    monkeypatch.setattr(semantic_duplicates, "RANGE_ROWS", 20)
    chance, found = np.random.default_rng(0), []
    increments = [chance.integers(0, 16, 50).tolist() for _ in range(3)]
    for engine, workers in (("inline", 1), ("ray", 2), ("ray", 1)):
        workspace = Workspace.open(tmp_path / f"{engine}{workers}", create=True)
        refs = [ref for number, values in enumerate(increments) for ref in fill(workspace, number, values)]
        with ray_session(workers) if engine == "ray" else contextlib.nullcontext():
            places = run_reducers(workspace.store, REDUCERS, {"web": refs}, SCORES, [], engine, workers)  # type: ignore[arg-type]
        found.append({name: d for name, d in contents(workspace.store).items() if name.startswith("scores/")})
        assert {name.split("/")[1] for name in found[0]} >= {place.split("/")[1] for place in places.values()}
    assert found[0] == found[1] == found[2] and any(name.endswith(".npy") for name in found[0])


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_copy_joins_the_group_whose_leader_is_forgotten(workspace: Workspace, rewritten: bool) -> None:
    store, grouping = workspace.store, {name: one for name, one in REDUCERS.items() if "group" in one.columns}
    leader, member = sorted((uid_of("web", 0), uid_of("web", 30)))
    refs = fill(workspace, 0, [1, 1])
    found = run_reducers(store, grouping, {"web": refs}, SCORES, [])
    workspace.bury("uid", [leader], "asked for")
    for ref in refs if rewritten else ():
        rewrite_shard(store, ref, {leader})
        for path in (ref.beside(place) for place in (*SCORES.values(), *found.values())):
            table = store.read_table(path)
            rows = [row if row["uid"] == member else {"uid": row["uid"]} for row in table.to_pylist()]
            store.write_table(path, pa.Table.from_pylist(rows, table.schema.remove_metadata()), table_metadata(table))
    for increment in (1, 2):
        refs += fill(workspace, increment, [1, 1])
        assert run_reducers(store, grouping, {"web": refs}, SCORES, []) == found and len(found) >= 4
    asking = fill(workspace, 3, [1, 1])
    for name, place in found.items():
        group = "pixel_group" if name == "exact_duplicates" else "group"  # all files have other bytes
        groups = [store.read_table(ref.beside(place))[group].to_pylist() for ref in refs]
        assert [leader] in groups[:2] and groups[2:] == [[leader]] * 4, (name, groups)
        given = (store, name, grouping[name], {"web": refs}, SCORES | found, [])
        assert ask(*given, {"canaries": asking}, [None, None])[0][group].to_pylist() == [leader] * 2, name
