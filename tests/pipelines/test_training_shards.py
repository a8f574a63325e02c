"""Training shards hold the kept pairs and nothing else, and come out the same whenever they are made."""

from filters.selection import select
from pairs.rules import Rule, TextsSpec
from pairs.shard import ShardRef, list_shards, read_shard
from pairs.workspace import Workspace
from pipelines.training_shards import publish_training_shards
from tests.filters.corpus import add, contents, folder, numbers, uid_of

KEEP = [Rule(column="clip.cosine", min=0.2)]


def made(workspace: Workspace) -> tuple[str, dict[str, list[ShardRef]]]:
    scores = ([0.9, 0.1, 0.5], [0.3, 0.1], [0.1])
    sizes = (range(3), range(3, 5), range(5, 6))
    web = [
        add(
            workspace,
            "web",
            "0000",
            members,
            {"clip": {"cosine": values}},
            index,
            [[f"text {n}", "b"] for n in members],
        )
        for index, (members, values) in enumerate(zip(sizes, scores, strict=True))
    ]
    held = numbers(1, held=True)
    clean = add(workspace, "clean", "0000", [*numbers(2), *held], {"clip": {"cosine": [0.0, None, 0.9]}})
    shards = {"web": web, "clean": [clean]}
    result = select(workspace.store, "small", KEEP, TextsSpec(), shards, {"clip": folder("clip")}, ["clean"])
    return result.folder, shards


def test_kept_pairs_are_copied_with_their_texts(workspace: Workspace) -> None:
    selection, shards = made(workspace)
    counts = publish_training_shards(workspace, selection, shards, ["clean"])
    refs = list_shards(workspace.store, counts.folder)
    assert [workspace.store.read_table(ref.table).num_rows for ref in refs] == [2, 2, 1, 0]
    assert (counts.total, counts.wrote) == (5, 4)
    shard = read_shard(workspace.store, refs[1])
    assert shard.table["uid"].to_pylist() == [uid_of("web", n) for n in (0, 2)]
    assert list(shard.images()) == [b"0", b"2"]
    assert shard.table["text"].to_pylist() == ["text 0", "text 2"]
    assert [text["text"] for text in shard.table["texts"][0].as_py()] == ["text 0", "b"]
    clean = workspace.store.read_table(refs[0].table)
    assert clean["uid"].to_pylist() == [uid_of("clean", n) for n in numbers(2)]
    assert clean["trusted"].to_pylist() == [True, True]


def test_made_again_the_bytes_are_the_same_and_finished_ones_are_left(workspace: Workspace) -> None:
    selection, shards = made(workspace)
    first = publish_training_shards(workspace, selection, shards, ["clean"])
    before = contents(workspace.store)
    lost = list_shards(workspace.store, first.folder)[1]
    workspace.store.delete(lost.table)
    again = publish_training_shards(workspace, selection, shards, ["clean"])
    assert (again.wrote, again.pairs) == (1, first.pairs)
    assert contents(workspace.store) == before
    assert publish_training_shards(workspace, selection, shards, ["clean"]).wrote == 0


def test_a_pair_forgotten_since_does_not_come_back(workspace: Workspace) -> None:
    selection, shards = made(workspace)
    workspace.bury("uid", [uid_of("web", 0)], "asked for")
    publish_training_shards(workspace, selection, shards, ["clean"])
    refs = list_shards(workspace.store, f"shards/{selection.split('/')[1]}/web-0123456789ab")
    assert workspace.store.read_table(refs[0].table)["uid"].to_pylist() == [uid_of("web", 2)]


def test_what_is_forgotten_after_publication_is_counted_no_more(workspace: Workspace) -> None:
    """The funnel and the training examples add up after a late opt-out, though the tar still holds the pair."""
    selection, shards = made(workspace)
    first = publish_training_shards(workspace, selection, shards, ["clean"])
    workspace.bury("uid", [uid_of("web", 0)], "asked for")
    again = publish_training_shards(workspace, selection, shards, ["clean"])
    assert (again.wrote, again.total) == (0, first.total - 1)
    result = select(workspace.store, "small", KEEP, TextsSpec(), shards, {"clip": folder("clip")}, ["clean"])
    assert result.folder == selection and result.kept == again.total
