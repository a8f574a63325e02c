"""Reducers' tables belong to who was asked: the sources, and which of them are trusted."""

import pytest

from filters.exact_duplicates import ExactDuplicates
from filters.reduce import run_reducers
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.workspace import Workspace
from tests.filters.corpus import add, row, uid_of

REDUCERS = {"exact": ExactDuplicates()}


def groups(workspace: Workspace, shards: dict[str, list[ShardRef]], trusted: list[str]) -> list[list[str]]:
    folder = run_reducers(workspace.store, REDUCERS, shards, {}, trusted)["exact"]
    return [workspace.store.read_table(ref.beside(folder))["group"].to_pylist() for ref in shards["web"]]


def test_an_answer_does_not_depend_on_which_recipe_ran_before() -> None:
    """One recipe with the clean source and one without share a workspace, in either order."""
    found = []
    for order in ((False, True), (True, False)):
        workspace = Workspace.open(f"memory://reduce-{order[0]}", create=True)
        web = [add(workspace, "web", "0000", [1, 2])]
        clean = ShardRef("pairs/clean-0123456789ab/0000", 0)
        write_shard(workspace.store, clean, [(row("clean", 7, b"1"), b"1")], PAIRS)
        both: dict[bool, list[list[str]]] = {}
        for with_clean in order:
            shards = {"web": web} | ({"clean": [clean]} if with_clean else {})
            both[with_clean] = groups(workspace, shards, ["clean"])
        found.append(both)
    leader = str(row("clean", 7, b"1")["uid"])
    assert found[0] == found[1]
    assert found[0][True] == [[leader, uid_of("web", 2)]] and found[0][False][0][0] == uid_of("web", 1)


@pytest.mark.parametrize("trusted", [[], ["clean"]])
def test_a_new_increment_stays_in_its_folder(workspace: Workspace, trusted: list[str]) -> None:
    first = add(workspace, "web", "0000", [1, 2])
    before = run_reducers(workspace.store, REDUCERS, {"web": [first]}, {}, trusted)
    second = add(workspace, "web", "0001", [3])
    assert run_reducers(workspace.store, REDUCERS, {"web": [first, second]}, {}, trusted) == before
