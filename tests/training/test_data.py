"""The loader: pixels where the plan says, one request per block, damage masked and counted."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pairs.errors import PairmillError
from pairs.store import Store
from tests.training.small import SPEC, encoded, picture, shards
from training import data
from training.data import Loader
from training.pixels import decode, patchify, resize
from training.plan import Cost
from training.tables import make_plan

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
    monkeypatch.setattr(data, "PAUSE_S", 0.0)
    store = Shaky(tmp_path)
    loader, store.requests, store.fails = _loader(store), [], data.READS - 1
    assert loader.load(0).valid.all()
    store.requests, store.fails = [], data.READS
    with pytest.raises(PairmillError, match=r"ConnectionResetError: reset by peer, 4 times"):
        _again(loader).load(0)


@pytest.mark.parametrize("nothing", [b"", b"no image"])
def test_what_is_no_image_is_none(nothing: bytes) -> None:
    assert decode(nothing) is None


def _again(loader: Loader) -> Loader:
    return Loader(loader.plan, loader.store, 0, 1, COST, 8, 0.0)


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
