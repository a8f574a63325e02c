"""Shards are read as they were written: by our reader, by range requests, and by other people's readers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pairs.errors import PairmillError
from pairs.schemas import PAIRS, TRAINING
from pairs.shard import MEMBERS, Shard, ShardRef, list_shards, read_shard, shard_at, write_shard
from pairs.store import Store, table_metadata
from pairs.tar import read_members
from tests.pairs.small import FOLDER, image, pair_row, training_row

REF = ShardRef(FOLDER, 7)
BUILDERS = {"pairs": (PAIRS, pair_row), "training": (TRAINING, training_row)}


def test_a_ref_names_its_files() -> None:
    assert (REF.tar, REF.table) == (f"{FOLDER}/00007.tar", f"{FOLDER}/00007.parquet")
    assert (REF.group, REF.increment) == ("web-0123456789ab", "0000")
    assert REF.beside("scores/clip-0") == "scores/clip-0/web-0123456789ab/0000/00007.parquet"
    assert shard_at(REF.table) == REF


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("place", ["local", "memory"])
def test_round_trip(kind: str, place: str, tmp_path: Path, memory_store: Store) -> None:
    store = Store(tmp_path) if place == "local" else memory_store
    schema, build = BUILDERS[kind]
    rows = [build(i) for i in range(5)]
    assert write_shard(store, REF, ((row, image(i)) for i, row in enumerate(rows)), schema) == 5
    shard = read_shard(store, REF)
    assert shard.table.schema.equals(schema, check_metadata=False)
    assert list(shard.images()) == [image(i) for i in range(5)]
    assert table_metadata(shard.table)["rows"] == "5"
    kept = {name: values for name, values in shard.table.to_pydict().items() if name in rows[0]}
    assert kept == {name: [row[name] for row in rows] for name in kept} and "texts" in kept
    assert shard.table["key"].to_pylist() == [row["uid"] for row in rows]


def test_each_member_is_one_range_request(memory_store: Store) -> None:
    write_shard(memory_store, REF, ((pair_row(i), image(i)) for i in range(4)), PAIRS)
    for i, row in enumerate(read_shard(memory_store, REF).table.to_pylist()):
        parts = [memory_store.read(REF.tar, row[f"{name}_offset"], row[f"{name}_size"]) for name in MEMBERS]
        assert parts[0] == image(i) and parts[1].decode() == row["text"]
        facts = json.loads(parts[2])
        given = pair_row(i)
        assert facts == {name: given[name] for name in facts}
        assert {"uid", "url", "texts", "page", "sha256", "width"} <= set(facts)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "a"), Store(tmp_path / "b")]
    for store in stores:
        write_shard(store, REF, ((pair_row(i), image(i)) for i in range(3)), PAIRS)
    for path in (REF.tar, REF.table):
        assert stores[0].read(path) == stores[1].read(path)


def test_an_empty_shard_is_a_shard(memory_store: Store) -> None:
    assert write_shard(memory_store, REF, [], PAIRS) == 0
    shard = read_shard(memory_store, REF)
    assert shard.table.num_rows == 0 and read_members(shard.tar, "t") == []


def test_a_pair_without_a_text_has_an_empty_one(memory_store: Store) -> None:
    write_shard(memory_store, REF, [(pair_row(0) | {"text": None, "texts": []}, image(0))], PAIRS)
    row = read_shard(memory_store, REF).table.to_pylist()[0]
    assert row["text"] is None and row["text_size"] == 0 and row["texts"] == []


def test_an_error_in_the_rows_publishes_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield pair_row(0), image(0)
        raise RuntimeError("decoder")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError, match="decoder"):
        write_shard(store, REF, rows(), PAIRS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_pair_twice_is_refused(memory_store: Store) -> None:
    with pytest.raises(PairmillError, match="leave out the second pair"):
        write_shard(memory_store, REF, [(pair_row(0), image(0))] * 2, PAIRS)
    assert memory_store.files("") == []


@pytest.mark.parametrize("damage", ["longer", "shorter", "missing"])
def test_a_tar_of_another_size_is_refused(damage: str, memory_store: Store) -> None:
    write_shard(memory_store, REF, [(pair_row(0), image(0))], PAIRS)
    tar = memory_store.read(REF.tar)
    memory_store.delete(REF.tar)
    if damage != "missing":
        memory_store.write(REF.tar, tar + bytes(512) if damage == "longer" else tar[:-512])
    with pytest.raises(PairmillError, match="the shard is made anew") as caught:
        read_shard(memory_store, REF)
    assert REF.tar in caught.value.expected and str(len(tar)) in caught.value.expected


def test_a_tar_without_a_table_is_no_shard(memory_store: Store) -> None:
    for index in (10, 2, 100_000):
        write_shard(memory_store, ShardRef(FOLDER, index), [(pair_row(0), image(0))], PAIRS)
    write_shard(memory_store, ShardRef("pairs/docs-0123456789ab/0000", 3), [(pair_row(0), image(0))], PAIRS)
    memory_store.write(f"{FOLDER}/00004.tar", b"")
    assert [ref.index for ref in list_shards(memory_store, FOLDER)] == [2, 10, 100_000]
    assert [ref.group[:3] for ref in list_shards(memory_store, "pairs")] == ["doc", "web", "web", "web"]


@pytest.mark.parametrize("name", [f"{FOLDER}/notes.parquet", "pairs/00000.parquet", f"{FOLDER}/-1.parquet"])
def test_stray_tables_are_named(name: str, memory_store: Store) -> None:
    memory_store.write_table(name, PAIRS.empty_table())
    with pytest.raises(PairmillError, match=name):
        list_shards(memory_store, "pairs")


def test_a_forgotten_pair_has_no_image() -> None:
    columns = {"image_offset": [0, None], "image_size": [2, None], "status": ["ok", "forgotten"]}
    assert list(Shard(REF, pa.table(columns), b"abc").images()) == [b"ab", None]


def outside(code: str, tmp_path: Path) -> Any:
    """What `code` prints as JSON in a fresh process that can't import pairmill; PATTERN names its two shards."""
    store = Store(tmp_path / "shards")
    for index, numbers in enumerate((range(0, 3), range(3, 5))):
        write_shard(store, ShardRef("pairs/w/0", index), ((pair_row(i), picture(i)) for i in numbers), PAIRS)
    pattern = str(tmp_path / "shards/pairs/w/0/0000{0..1}.tar")
    block = "import sys, json; sys.path[:] = [p for p in sys.path if p and 'editable' not in p]\n"
    block += "sys.modules.update(dict.fromkeys(('pairs', 'filters', 'training', 'pipelines', 'cluster')))\n"
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "WDS_SECURE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", f"{block}PATTERN = {pattern!r}\n{code}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def picture(i: int) -> bytes:
    """A real JPEG: these readers decode."""
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    Image.new("RGB", (8 + i, 6), (10 * i, 0, 0)).save(out, "JPEG")
    return out.getvalue()


def test_webdataset_and_datasets_read_it_without_pairmill(tmp_path: Path) -> None:
    code = """if True:
        import datasets, webdataset
        data = webdataset.WebDataset(PATTERN, shardshuffle=False).decode("pil")
        one = [[r["__key__"], r["jpg"].size, r["txt"], r["json"]["url"]] for r in data]
        files = [PATTERN.replace("{0..1}", str(i)) for i in (0, 1)]
        data = datasets.load_dataset("webdataset", data_files={"train": files}, split="train")
        other = [[r["__key__"], r["jpg"].size, r["txt"], r["json"]["url"]] for r in data]
        print(json.dumps([one, other]))"""
    expected = [[r["uid"], [8 + i, 6], r["text"], r["url"]] for i, r in enumerate(map(pair_row, range(5)))]
    assert outside(code, tmp_path) == [expected, expected]


def test_open_clip_reads_it_for_training_and_validation(tmp_path: Path) -> None:
    code = """if True:
        from types import SimpleNamespace
        from open_clip_train.data import get_wds_dataset
        found = []
        for train in (True, False):
            args = SimpleNamespace(train_data=PATTERN, val_data=PATTERN, train_num_samples=5, val_num_samples=5, seed=0)
            vars(args).update(batch_size=1, workers=0, world_size=1, train_data_upsampling_factors=None)
            loader = get_wds_dataset(args, lambda image: image.width, train, tokenizer=lambda text: [text]).dataloader
            found.append(sorted([int(image[0]), text[0]] for image, text in loader))
        print(json.dumps(found))"""
    expected = [[8 + i, r["text"]] for i, r in enumerate(map(pair_row, range(5)))]
    assert outside(code, tmp_path) == [expected, expected]


def test_the_fresh_process_really_lacks_pairmill(tmp_path: Path) -> None:
    code = "try:\n    import pairs.tar\nexcept ImportError as error:\n    print(json.dumps(str(error)))"
    assert "pairs" in outside(code, tmp_path)
