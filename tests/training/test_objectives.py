"""InfoNCE over ranks: gradients equal a single process's with uneven counts; what is masked is masked."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from training import objectives

torch.set_num_threads(1)
COUNTS = {1: (9,), 2: (1, 8), 3: (2, 6, 1)}
SAME = torch.tensor([[i, i if i != 6 else 2] for i in range(9)])  # pairs 2 and 6 have one text
VALID = torch.tensor([True, True, True, False, True, True, True, True, True])


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.image, self.text = (torch.nn.Linear(6, 5).double() for _ in range(2))
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1), self.scale.exp()


def _gradients(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    counts, model = COUNTS[ranks], Towers()
    run: torch.nn.Module = model
    if ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks)
        run = DistributedDataParallel(model, gradient_as_bucket_view=True)
    generator = torch.Generator().manual_seed(8)
    x, y = (torch.randn(9, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    total, count = objectives.clip(*run(x[own], y[own]), VALID[own], SAME, counts, rank)
    sums = torch.stack([total.detach(), count.double()])
    if ranks > 1:
        dist.all_reduce(sums)
    (total * ranks / sums[1]).backward()
    if rank == 0:
        torch.save([sums[0] / sums[1], *(p.grad for p in model.parameters())], f"{folder}/{ranks}.pt")
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_gradients_on_ranks_with_uneven_counts_equal_the_single_process(tmp_path: Path, ranks: int) -> None:
    _gradients(0, 1, str(tmp_path))
    mp.start_processes(_gradients, (ranks, str(tmp_path)), nprocs=ranks, start_method="spawn")
    single, several = (torch.load(tmp_path / f"{n}.pt") for n in (1, ranks))
    assert len(single) == 6
    for expected, found in zip(single, several, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_the_loss_is_the_formula_written_out() -> None:
    image, text = (F.normalize(torch.randn(9, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor(3.0, dtype=torch.float64)
    total, count = objectives.clip(image, text, scale, VALID, SAME, (9,), 0)
    expected = 0.0
    for i in range(9):
        if not VALID[i]:
            continue
        others = [j for j in range(9) if VALID[j] and (j == i or SAME[j, 1] != SAME[i, 1])]
        for a, b in ((image, text), (text, image)):
            logits = torch.stack([scale * a[i] @ b[j] for j in others])
            expected += float(logits.logsumexp(0) - scale * a[i] @ b[i]) / 2
    assert int(count) == 8
    assert float(total) == pytest.approx(expected, rel=1e-12)


def test_an_invalid_pair_moves_nothing() -> None:
    image, text = (torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    total, _ = objectives.clip(image, text, torch.tensor(2.0), VALID, SAME, (9,), 0)
    total.backward()
    assert image.grad is not None and text.grad is not None
    assert not image.grad[3].any() and not text.grad[3].any() and image.grad[4].any()
