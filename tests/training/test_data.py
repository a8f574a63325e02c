"""The loader: pixels where the plan says, one request per block, damage masked and counted."""

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.shard import ShardRef
from pairs.store import Store
from tests.training.small import SPEC, config, encoded, picture, shards
from training import blocks
from training.blocks import Cache
from training.config import Pin
from training.data import AHEAD, Batch, Loader
from training.decoding import Decoders
from training.pixels import Item, Look, decode, fill, patchify, resize
from training.plan import Block, Cost
from training.run import train_rank
from training.tables import make_plan

torch.set_num_threads(1)
COST = Cost((2, 32), (2, 32))


class Counted(Store):
    """A store that notes its range requests."""

    requests: list[tuple[str, int]]

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        if size is not None:
            self.requests.append((path, start))
        return super().read(path, start, size)


def _loader(store: Store, rank: int = 0, ranks: int = 1, jitter: float = 0.0) -> Loader:
    plan, _ = make_plan(store, shards(store), SPEC)
    return Loader(plan, store, rank, ranks, COST, 8, jitter)


def test_a_batch_holds_the_planned_pixels_and_tokens(memory_store: Store) -> None:
    loader = _loader(memory_store)
    batch, plan = loader.load(2), loader.plan
    for place, (epoch, row) in enumerate(plan.rows(2)):
        number = next(i for i in range(60) if np.array_equal(_uid(i), plan.uids[row]))
        grid = plan.grid(row)
        start = int(batch.parts[0][0].pool[place])
        expected = patchify(resize(picture(number), grid, 8), grid, 8)
        assert np.array_equal(batch.parts[0][0].patches[start + 1 : start + 1 + grid[0] * grid[1]].numpy(), expected)
        ids = plan.tokens.ids[plan.text(epoch, row)]
        end = int(batch.parts[0][1].pool[place]) + 1
        assert np.array_equal(batch.parts[0][1].tokens[end - len(ids) : end].numpy(), ids)
    assert batch.valid.all() and batch.counts == (16,) and not batch.damaged


def _uid(i: int) -> str:
    from tests.training.small import pair

    return str(pair(i)[0]["uid"])


def test_patches_are_in_the_order_of_a_convolution() -> None:
    pixels = picture(0)[:16, :24]
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).double()[None]
    weight = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    expected = torch.nn.functional.conv2d(image, weight, stride=8).flatten(2)[0].T
    torch.testing.assert_close(torch.from_numpy(patchify(pixels, (2, 3), 8)).double() @ weight.flatten(1).T, expected)


def test_one_range_request_for_each_block(tmp_path: Path) -> None:
    store = Counted(tmp_path)
    store.requests = []
    loader = _loader(store)
    for _ in loader.batches(0, 8):
        pass
    assert len(store.requests) == len(set(store.requests)) == len(loader.plan.blocks) == 3


def test_ranks_read_each_block_once_and_hold_their_own_images_of_a_window(tmp_path: Path) -> None:
    store, ranks = Counted(tmp_path), 3
    plan, _ = make_plan(store, shards(store, 700, 100), SPEC.model_copy(update={"batch_pairs": 12}))
    plan.__dict__["window_of"] = lambda step: (step // 8 * 8, step // 8 * 8 + 8)  # else all is one window
    whole = [Loader(plan, Store(tmp_path), 0, 1, COST, 8, 0.0).load(step) for step in range(8, 40)]
    images = 0
    for rank in range(ranks):
        loader, store.requests, most = Loader(plan, store, rank, ranks, COST, 8, 0.0), [], 0
        for step, batch in enumerate(loader.batches(8, 40), 8):
            most = max(most, len(loader._blocks._held))
            images += int(batch.valid.sum())
            assert torch.equal(batch.same.sort(0)[0], whole[step - 8].same.sort(0)[0])
        windows = [{int(plan.block_of[row]) for step in range(first, first + 8) for row in loader._rows(step)}
                   for first in range(8, 40, 8)]  # fmt: skip
        assert len(store.requests) <= sum(map(len, windows)) and len(windows[0]) > 8
        assert most <= 12 / ranks * (8 + AHEAD + 1) and not loader._blocks._held
    assert images == 12 * 32


def test_what_is_read_ahead_ends_with_the_run(tmp_path: Path) -> None:
    store = Counted(tmp_path)
    store.requests = []
    loader = _loader(store)
    before = set(threading.enumerate())
    next(batches := loader.batches(0, 1))
    own = {int(loader.plan.block_of[row]) for _, row in loader.plan.rows(0)}
    assert len(store.requests) == len(own) and not loader._blocks._uses
    batches.close()
    assert set(threading.enumerate()) <= before and not loader._blocks._held


def test_a_batch_is_moved_whole(memory_store: Store) -> None:
    batch = _varied(memory_store, shards(memory_store), 0).load(0)
    seen: list[torch.Tensor] = []
    again = batch.moved(lambda x: seen.append(x) or x.clone())  # type: ignore[func-returns-value]
    assert same([batch], [again]) and len(seen) == 2 + len(batch.parts) * 8
    assert again.parts[0][0].layout.runs == batch.parts[0][0].layout.runs


def test_jitter_hangs_on_the_epoch_and_keeps_the_shape(memory_store: Store) -> None:
    plain, jittered = _loader(memory_store), _loader(memory_store, jitter=0.1)
    a, b, again = plain.load(0).parts[0][0], jittered.load(0).parts[0][0], jittered.load(0).parts[0][0]
    assert a.layout.runs == b.layout.runs and not torch.equal(a.patches, b.patches)
    assert torch.equal(b.patches, again.patches)


def test_damaged_pairs_are_masked_counted_and_change_no_shape(memory_store: Store) -> None:
    loader = _loader(memory_store)
    whole = loader.load(0)
    (_, first), (_, second) = loader.plan.rows(0)[3], loader.plan.rows(0)[5]
    for row in (first, second):
        block = loader.plan.blocks[int(loader.plan.block_of[row])]
        tar = bytearray(memory_store.read(block.shard.tar))
        start, size = int(loader.plan.offsets[row]), int(loader.plan.sizes[row])
        tar[start : start + size] = bytes(size)
        memory_store.write(block.shard.tar, bytes(tar))
    batch = _again(loader).load(0)
    assert batch.valid.tolist() == [i not in (3, 5) for i in range(16)]
    assert batch.damaged == {"undecodable": 2} and batch.parts[0][0].layout.runs == whole.parts[0][0].layout.runs


class Shaky(Counted):
    """A store that is away at the first `fails` range requests."""

    fails = 0

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        data = super().read(path, start, size)
        if size is not None and len(self.requests) <= self.fails:
            raise ConnectionResetError("reset by peer")
        return data


def test_a_store_that_is_away_is_asked_again_and_in_the_end_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "PAUSE_S", 0.0)
    store = Shaky(tmp_path)
    loader, store.requests, store.fails = _loader(store), [], blocks.READS - 1
    assert loader.load(0).valid.all()
    store.requests, store.fails = [], 3 * blocks.READS  # of three blocks, read at once
    with pytest.raises(PairmillError, match=r"ConnectionResetError: reset by peer, 4 times"):
        _again(loader).load(0)


@pytest.mark.parametrize("nothing", [b"", b"no image"])
def test_what_is_no_image_is_none(nothing: bytes) -> None:
    assert decode(nothing) is None


def _again(loader: Loader) -> Loader:
    return Loader(loader.plan, loader._blocks.store, 0, 1, COST, 8, 0.0)


def test_ranks_together_hold_the_step(memory_store: Store) -> None:
    parts = [_loader(memory_store, rank, 3).load(1) for rank in range(3)]
    assert sum(len(p.valid) for p in parts) == 16 and {p.counts for p in parts} == {tuple(len(p.valid) for p in parts)}
    assert all(torch.equal(p.same, parts[0].same) for p in parts)


@pytest.mark.parametrize("ext", [".jpg", ".png", ".webp"])
def test_big_pictures_may_be_decoded_small(ext: str) -> None:
    big = np.kron(picture(2), np.ones((8, 8, 1), np.uint8))  # 640 x 640
    big_bytes = encoded(big, ext)
    reduced, whole = decode(big_bytes, (640, 640), (4, 4), 8), decode(big_bytes)
    assert reduced is not None and whole is not None and whole.shape == (640, 640, 3)
    near = [resize(p, (4, 4), 8).astype(float) for p in (reduced, whole)]
    assert np.abs(near[0] - near[1]).mean() < 3
    assert decode(big_bytes, (641, 640), (4, 4), 8) is None  # not what the table says


def same(one: list[Batch], other: list[Batch]) -> bool:
    """Whether batches agree to the last byte."""
    for a, b in zip(one, other, strict=True):
        for (images, texts), (images_b, texts_b) in zip(a.parts, b.parts, strict=True):
            pairs = [(images.patches, images_b.patches), (images.place, images_b.place), (texts.tokens, texts_b.tokens)]
            if not all(torch.equal(x, y) for x, y in [*pairs, (a.valid, b.valid), (a.same, b.same)]):
                return False
    return True


def _varied(store: Store, pins: list[Pin], workers: int, cache: Cache | None = None) -> Loader:
    plan, _ = make_plan(store, pins, SPEC.model_copy(update={"patch_dropout": 0.3}))
    return Loader(plan, store, 0, 1, COST, 8, 0.1, accumulate=2, multiple=8, workers=workers, cache=cache)


def test_batches_are_the_same_bytes_from_any_number_of_decoder_processes(memory_store: Store) -> None:
    pins = shards(memory_store)
    ref = pins[1].ref
    tar, row = bytearray(memory_store.read(ref.tar)), memory_store.read_table(ref.table).to_pylist()[5]
    tar[row["image_offset"] : row["image_offset"] + row["image_size"]] = bytes(row["image_size"])
    memory_store.write(ref.tar, bytes(tar))
    here, *others = ([*_varied(memory_store, pins, workers).batches(0, 4)] for workers in (0, 1, 3))
    assert all(same(here, batches) for batches in others) and sum(sum(b.damaged.values()) for b in here) == 1
    assert not decoders()


def decoders() -> list[psutil.Process]:
    """Not the helpers that other tests' compilers have left running."""
    return [child for child in psutil.Process().children() if "training.decoding" in child.cmdline()]


def test_a_run_resumed_in_the_middle_sees_the_same_batches(memory_store: Store) -> None:
    pins = shards(memory_store)
    whole = [*_varied(memory_store, pins, 0).batches(0, 7)]
    assert same(whole[5:], [*_varied(memory_store, pins, 0).batches(5, 7)])


def test_a_decoder_that_dies_is_told_with_its_shards(memory_store: Store) -> None:
    loader = _varied(memory_store, shards(memory_store), 1)
    batches = loader.batches(0, 100)
    next(batches)
    decoders()[0].kill()
    with pytest.raises(PairmillError, match=r"(?s)decode shards/all-0123456789ab/0000/0000\d\.tar.*exit code -9"):
        for _ in batches:
            pass
    assert not decoders()


def test_a_decoder_s_memory_is_limited(tmp_path: Path) -> None:
    big = encoded(np.zeros((5000, 5000, 3), np.uint8))  # 75 MB
    look, decoders = Look(0, 8, 0.0, 0.0), Decoders(1, Look(0, 8, 0.0, 0.0), -19 << 20)  # 56 MB beyond its own
    items = [Item(data, size, (1, 1), 0, "0", start) for start, (data, size) in enumerate(
        [(big, (5000, 5000)), (encoded(picture(0)), (96, 64))]
    )]  # fmt: skip
    with contextlib.closing(decoders), (tmp_path / "stream").open("w+b") as file:
        file.truncate(2 * 192)
        assert decoders.fill(file.fileno(), 192, items, str) == [False, True]
    assert fill(np.zeros((1, 192), np.uint8), items[0], look)


def test_no_decoder_outlives_a_killed_trainer() -> None:
    code = """
import os, psutil
from training.decoding import Decoders
from training.pixels import Look
decoders = Decoders(2, Look(0, 8, 0.0, 0.0), 1000)
print(*(c.pid for c in psutil.Process().children()), flush=True)
os.kill(os.getpid(), 9)
"""
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False).stdout.split()
    _, alive = psutil.wait_procs([psutil.Process(int(pid)) for pid in told if psutil.pid_exists(int(pid))], timeout=10)
    assert len(told) == 2 and not alive


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (1, 2), (4, 2)])
def test_one_shape_serves_a_run(memory_store: Store, ranks: int, accumulate: int) -> None:
    plan, _ = make_plan(memory_store, shards(memory_store), SPEC)
    settings = {"accumulate": accumulate, "multiple": 16, "steps": 12}
    loaders = [Loader(plan, memory_store, rank, ranks, COST, 8, 0.0, **settings) for rank in range(ranks)]
    batches = [batch for loader in loaders for batch in loader.batches(0, 12)]
    shapes = {shape for loader in loaders for shape in loader.shapes}
    assert len(shapes) == 1 and all(n % 16 == 0 for n in next(iter(shapes))[1:])
    for images, texts in (part for batch in batches for part in batch.parts):
        for packed in (images, texts):
            assert packed.layout.tokens - packed.useful == int(packed.layout.cu_seqlens.diff()[-1]) > 0
            assert len(packed.layout.cu_seqlens) == len(packed.pool) + 2


def test_blocks_are_read_from_the_cache_where_they_are_whole(tmp_path: Path) -> None:
    store, folder = Counted(f"memory://{uuid.uuid4().hex}"), tmp_path / "pairmill-blocks"
    store.requests, pins = [], shards(store)
    expected = [*_varied(store, pins, 0).batches(0, 3)]
    requests = []
    for damage in (None, None, b"cut", b"wrong"):
        files = sorted(folder.glob("*"))
        if damage == b"cut":
            files[0].write_bytes(files[0].read_bytes()[:-1])
        if damage == b"wrong":
            data = bytearray(files[1].read_bytes())
            data[500] ^= 1
            files[1].write_bytes(data)
        store.requests = []
        assert same(expected, [*_varied(store, pins, 0, Cache(tmp_path, 10**9)).batches(0, 3)])
        requests.append(len(store.requests))
    assert requests == [3, 0, 1, 1] and len(list(folder.iterdir())) == 3


def test_a_cache_lets_go_of_what_was_used_least_recently(tmp_path: Path) -> None:
    cache, block = Cache(tmp_path, 1000), Block(ShardRef("shards/a-0/0000", 0), 0, 1, 0, 100, "f" * 64)
    blocks = [dataclasses.replace(block, start=n) for n in range(12)]
    for age, one in enumerate(blocks[:6]):
        cache.put(one, bytes([age]) * 100)
        os.utime(cache._path(one), (age, age))
    assert cache.get(blocks[0]) == bytes(100)  # now used most recently
    for one in blocks[6:]:
        cache.put(one, b"x" * 100)
    held = [cache.get(one) is not None for one in blocks]
    assert held[0] and not held[1] and held[11] and sum(f.stat().st_size for f in cache.folder.iterdir()) <= 1000


def test_a_cache_touches_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 1000)
    mine = [tmp_path / "photo.raw", tmp_path / "pairmill-blocks/notes", tmp_path / "pairmill-blocks/folder"]
    for path in mine[:2]:
        path.write_bytes(bytes(5000))
        os.utime(path, (1, 1))
    mine[2].mkdir()
    for age in range(20):
        cache.put(Block(ShardRef("shards/a-0/0000", 0), 0, 1, age, 100, "f" * 64), bytes(100))
    assert all(path.exists() for path in mine) and len([*(tmp_path / "pairmill-blocks").iterdir()]) < 12


def test_a_cache_on_a_full_disk_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Counted(tmp_path / "far")
    store.requests, pins = [], shards(store)
    loader = _varied(store, pins, 0, Cache(tmp_path / "near", 10**9))
    monkeypatch.setattr(blocks.os, "replace", full)
    assert len([*loader.batches(0, 3)]) == 3 and caplog.text.count("takes no more blocks: No space left") == 1
    assert not list((tmp_path / "near/pairmill-blocks").iterdir())


def test_a_run_with_decoders_and_a_cache_ends_in_the_same_model(tmp_path: Path) -> None:
    settings = {"steps": 2, "token_multiple": 8, "loader_workers": 2, "cache": str(tmp_path / "near")}
    runs = [
        config(tmp_path, "here", **settings | {"loader_workers": 0, "cache": None}),
        config(tmp_path, "apart", **settings),
    ]
    assert runs[0].fingerprint == runs[1].fingerprint
    results = [train_rank(run, 0, 1, torch.device("cpu")) for run in runs]
    assert content_hash(Path(results[0].model)) == content_hash(Path(results[1].model))
    assert results[0].fill == results[1].fill < 1 and len(list((tmp_path / "near/pairmill-blocks").iterdir())) == 3
