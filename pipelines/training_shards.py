"""Training shards: what training reads. The kept pairs of a pair shard, with their kept texts.

They mirror the pair shards, so an increment or a moved threshold rewrites only what changed. Image bytes are copied,
nothing is encoded again, and no shuffle is needed: the loader shuffles. A pair shard of which nothing is kept gives a
shard of no rows, so that it counts as made.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pairs.errors import PairmillError
from pairs.schemas import SELECTION, TRAINING
from pairs.shard import ShardRef, read_shard, write_shard
from pairs.store import Store
from pairs.workspace import Workspace, alive

COPIED: tuple[str, ...] = ("uid", "url_key", "status", "url", "page", "license", "source_uid", "sha256", "image_ext")
COPIED += ("width", "height", "original_width", "original_height")


@dataclass(frozen=True)
class TrainingCounts:
    """Living `pairs` by training shard's table (what is forgotten later isn't trained on), and how many shards this
    call `wrote`."""

    folder: str
    pairs: dict[str, int]
    wrote: int

    @property
    def total(self) -> int:
        return sum(self.pairs.values())

    def count(self, store: Store, uids: Collection[str]) -> int:
        """How many of `uids` stand in the shards."""
        wanted = pa.array(list(uids), pa.string())
        tables = (store.read_table(path, ["uid"]) for path, pairs in self.pairs.items() if pairs and len(wanted))
        return sum(pc.sum(pc.is_in(table["uid"], wanted)).as_py() for table in tables)


def publish_training_shards(
    workspace: Workspace, selection: str, shards: Mapping[str, Sequence[ShardRef]], trusted: Collection[str] = ()
) -> TrainingCounts:
    """Writes the training shards of a selection (its folder) that are missing, below `shards/<its name>`."""
    store = workspace.store
    folder = f"shards/{selection.rsplit('/', 1)[1]}"
    there, dead = set(store.files(folder, ".parquet")), workspace.tombstones()
    counts, wrote = {}, 0
    for source, refs in shards.items():
        for ref in sorted(refs):
            target = training_shard(folder, ref)
            if target.table in there:
                table = store.read_table(target.table, ["uid", "url_key", "status"])
                counts[target.table] = pc.sum(alive(table, dead)).as_py() or 0
                continue
            rows = _kept(workspace, selection, ref, source, source in trusted)
            counts[target.table] = write_shard(store, target, rows, TRAINING)
            wrote += 1
    return TrainingCounts(folder, counts, wrote)


def training_shard(folder: str, ref: ShardRef) -> ShardRef:
    """Which training shard below `folder` holds the kept pairs of the pair shard `ref`."""
    return ShardRef(f"{folder}/{ref.group}/{ref.increment}", ref.index)


def _kept(
    workspace: Workspace, selection: str, ref: ShardRef, source: str, trusted: bool
) -> Iterator[tuple[dict[str, object], bytes]]:
    """Row and image of each kept pair of one pair shard."""
    verdicts = _verdicts(workspace.store, selection, ref)
    if not any(verdicts["kept"]):
        return
    shard = read_shard(workspace.store, ref)
    living = workspace.alive(shard.table)
    facts = {"source": source, "increment": ref.increment, "trusted": trusted}
    rows = zip(shard.table.select(list(COPIED)).to_pylist(), living, *verdicts.values(), shard.images(), strict=True)
    for row, lives, uid, kept, texts, image in rows:
        if kept and lives and image is not None:
            assert uid == row["uid"], f"{selection} and {ref.table} differ at {uid}"
            assert texts, f"{uid} is kept without a text"
            yield row | facts | {"texts": texts, "text": texts[0]["text"]}, image


def _verdicts(store: Store, selection: str, ref: ShardRef) -> dict[str, list[object]]:
    path = ref.beside(selection)
    if not store.has(path):
        raise PairmillError(
            expected=f"the selection's table {path}",
            found="none",
            remedy="run `pairmill curate` on this workspace first",
        )
    table = store.read_table(path).cast(SELECTION)
    return {name: table[name].to_pylist() for name in ("uid", "kept", "texts")}
