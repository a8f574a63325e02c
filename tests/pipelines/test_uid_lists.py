"""A selection leaves as a uid list and comes back as a rule, with the same pairs."""

import json
from pathlib import Path

import numpy as np
import pytest

from filters.selection import select
from pairs.errors import PairmillError
from pairs.rules import Rule, TextsSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.workspace import Workspace
from pipelines.uid_lists import export_uids
from tests.filters.corpus import GROUPS, row

THEIRS = [f"{n:032x}" for n in (9, 2, 7, 1, 5)]


def fill(space: Workspace) -> dict[str, list[ShardRef]]:
    """Five pairs of DataComp's with their uids, and two of a folder without."""
    shards = {}
    for source, uids in (("web", THEIRS), ("clean", [None, None])):
        ref = ShardRef(f"pairs/{GROUPS[source]}/0000", 0)
        rows = [(row(source, n, b"%d" % n) | {"source_uid": u, "width": n}, b"%d" % n) for n, u in enumerate(uids)]
        write_shard(space.store, ref, rows, PAIRS)
        shards[source] = [ref]
    return shards


def test_a_selection_makes_the_round_trip(workspace: Workspace, tmp_path: Path) -> None:
    shards, path, other = fill(workspace), tmp_path / "kept.npy", tmp_path / "again.npy"
    first = select(workspace.store, "small", [Rule(column="pairs.width", min=2)], TextsSpec(), shards, {}, [])
    told = export_uids(workspace, "small", path, source="web")
    assert (told.kept, told.uids, told.without) == (3, 3, 0)
    assert [int(low) for _, low in np.load(path)] == [1, 5, 7]
    rule = Rule(column="pairs.source_uid", in_list=str(path))
    again = select(workspace.store, "again", [rule], TextsSpec(), shards, {}, [])
    ref = shards["web"][0]
    kept = [workspace.store.read_table(ref.beside(r.folder))["kept"].to_pylist() for r in (first, again)]
    assert kept[0] == kept[1] == [False, False, True, True, True]
    other.write_bytes(path.read_bytes())
    moved = Rule(column="pairs.source_uid", in_list=str(other))
    assert moved.name == rule.name
    assert select(workspace.store, "again", [moved], TextsSpec(), shards, {}, []).folder == again.folder, (
        "content counts"
    )
    np.save(other, np.load(path)[:1])
    assert select(workspace.store, "again", [moved], TextsSpec(), shards, {}, []).folder != again.folder


def test_pairs_without_a_uid_are_counted_or_refused(workspace: Workspace, tmp_path: Path) -> None:
    shards = fill(workspace)
    select(workspace.store, "small", [], TextsSpec(), shards, {}, [])
    told = export_uids(workspace, "small", tmp_path / "a.npy")
    assert (told.kept, told.uids, told.without) == (7, 5, 2)
    assert export_uids(workspace, "small", tmp_path / "b.npy", column="uid").uids == 7
    with pytest.raises(PairmillError, match="2 kept pairs without one"):
        export_uids(workspace, "small", tmp_path / "c.npy", source="clean")
    with pytest.raises(PairmillError, match="did you mean 'small"):
        export_uids(workspace, "smal", tmp_path / "c.npy")
    with pytest.raises(PairmillError, match="source_uid"):
        export_uids(workspace, "small", tmp_path / "c.npy", column="source_id")


def test_a_recipes_name_means_what_its_latest_run_selected(workspace: Workspace, tmp_path: Path) -> None:
    shards, path = fill(workspace), tmp_path / "a.npy"
    made = []
    for low in (0, 2, 3):
        rule = Rule(column="pairs.width", min=low)
        made.append(select(workspace.store, "small", [rule], TextsSpec(), shards, {}, []).folder)
    with pytest.raises(PairmillError, match="give the whole name") as error:
        export_uids(workspace, "small", path)
    assert all(folder.rpartition("/")[2] in str(error.value) for folder in made)

    def run(name: str, started: float, *rounds: str) -> None:
        stages = {"crawl": {"started": started}, "report": {"started": started + 1}}
        workspace.store.write(f"runs/{name}/stages.json", json.dumps(stages))
        for number, folder in enumerate(rounds, 1):
            told = json.dumps({"selection": folder})
            workspace.store.write(f"runs/{name}/round-{number}/curation.json", told)

    run("small-aaaaaaaaaaaa-0001", 5.0, made[0], made[1])
    run("small-bbbbbbbbbbbb-0001", 3.0, made[2])
    run("small-other-cccccccccccc-0001", 9.0, made[2])
    run("small-dddddddddddd-0001", 9.0)
    assert export_uids(workspace, "small", path).selection == made[1]
    run("small-bbbbbbbbbbbb-0002", 7.0, made[2])
    assert export_uids(workspace, "small", path).selection == made[2]
    assert export_uids(workspace, made[0].rpartition("/")[2], path).selection == made[0], "a whole name is the one"
    run("small-bbbbbbbbbbbb-0002", 7.0, "selections/small-999999999999")
    with pytest.raises(PairmillError, match="give the whole name"):
        export_uids(workspace, "small", path)


def test_a_forgotten_pair_is_in_no_list(workspace: Workspace, tmp_path: Path) -> None:
    shards = fill(workspace)
    select(workspace.store, "small", [], TextsSpec(), shards, {}, [])
    workspace.bury("uid", [str(row("web", 1, b"1")["uid"])], "asked for")
    assert export_uids(workspace, "small", tmp_path / "a.npy", source="web").uids == 4
    assert 2 not in [int(low) for _, low in np.load(tmp_path / "a.npy")]
