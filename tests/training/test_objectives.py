"""Objectives over ranks: gradients equal a single process's with uneven counts; what is masked is masked."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from training import objectives
from training.objectives import OBJECTIVES, Share

torch.set_num_threads(1)
COUNTS = {1: (9,), 2: (1, 8), 4: (2, 5, 1, 1)}
SAME = torch.tensor([[i, i if i != 6 else 2] for i in range(9)])  # pairs 2 and 6 have one text
VALID = torch.tensor([True, True, True, False, True, True, True, True, True])


class Towers(torch.nn.Module):
    def __init__(self, biased: bool) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.image, self.text = (torch.nn.Linear(6, 5).double() for _ in range(2))
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) if biased else None

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return F.normalize(self.image(x), dim=-1), F.normalize(self.text(y), dim=-1), self.scale.exp(), self.bias


def _gradients(rank: int, ranks: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    counts, model = COUNTS[ranks], Towers(biased=name == "siglip")
    run: torch.nn.Module = model
    if ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{ranks}", rank=rank, world_size=ranks)
        run = DistributedDataParallel(model, gradient_as_bucket_view=True)
    generator = torch.Generator().manual_seed(8)
    x, y = (torch.randn(9, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    total, count = OBJECTIVES[name](*run(x[own], y[own]), Share(VALID[own], SAME, counts, rank))
    sums = torch.stack([total.detach(), count.double()])
    if ranks > 1:
        dist.all_reduce(sums)
    (total * ranks / sums[1]).backward()
    if rank == 0:
        gradients = {n: p.grad for n, p in model.named_parameters()}
        torch.save({"loss": sums[0] / sums[1]} | gradients, f"{folder}/{ranks}.pt")
    if ranks > 1:
        dist.barrier()
        os._exit(0)  # the interpreter's end may meet gloo's threads (SIGABRT), after all is done


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_on_ranks_with_uneven_counts_equal_the_single_process(tmp_path: Path, ranks: int, name: str) -> None:
    _gradients(0, 1, str(tmp_path), name)
    mp.start_processes(_gradients, (ranks, str(tmp_path), name), nprocs=ranks, start_method="spawn")
    single, several = (torch.load(tmp_path / f"{n}.pt") for n in (1, ranks))
    assert float(single["scale"]) != 0 and len(single) == (7 if name == "siglip" else 6)
    for key, expected in single.items():
        torch.testing.assert_close(several[key], expected, rtol=1e-10, atol=1e-14)


def _sigmoid_written_out(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    parts = []
    for i in range(9):
        for j in range(9):
            if VALID[i] and VALID[j] and (j == i or SAME[j, 1] != SAME[i, 1]):
                logit = scale * image[i] @ text[j] + bias
                parts.append(-F.logsigmoid(logit if i == j else -logit))
    return torch.stack(parts).sum()


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_sigmoid_loss_and_its_gradients_are_those_of_the_formula(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectives, "CHUNK", chunk)
    torch.manual_seed(3)
    given = [torch.randn(9, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    given += [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -2.0)]
    share = Share(VALID, SAME, (9,), 0)
    total, count = objectives.siglip(given[0], given[1], given[2], given[3], share)
    expected = _sigmoid_written_out(given[0], given[1], given[2], given[3])
    assert int(count) == 8 and float(total) == pytest.approx(float(expected), rel=1e-12)
    wanted = torch.autograd.grad(expected * 0.3, given)
    for found, want in zip(torch.autograd.grad(total * 0.3, given), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-13)


def test_the_sigmoid_loss_holds_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHUNK", 32)
    seen: list[tuple[int, ...]] = []
    plain = F.softplus
    monkeypatch.setattr(F, "softplus", lambda x: (seen.append(tuple(x.shape)), plain(x))[1])
    image, text = (F.normalize(torch.randn(100, 8), dim=-1).requires_grad_() for _ in range(2))
    same = torch.arange(100)[:, None].expand(-1, 2)
    scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    total, _ = objectives.siglip(image, text, scale, bias, Share(torch.ones(100, dtype=torch.bool), same, (100,), 0))
    held = [x.shape for x in total.grad_fn.saved_tensors]  # type: ignore[union-attr]
    assert seen == [(100, 32)] * 3 + [(100, 4)] and held == [(100, 8), (100, 8), (), ()]


def test_the_loss_is_the_formula_written_out() -> None:
    image, text = (F.normalize(torch.randn(9, 5, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor(3.0, dtype=torch.float64)
    total, count = objectives.clip(image, text, scale, None, Share(VALID, SAME, (9,), 0))
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
    total, _ = objectives.clip(image, text, torch.tensor(2.0), None, Share(VALID, SAME, (9,), 0))
    total.backward()
    assert image.grad is not None and text.grad is not None
    assert not image.grad[3].any() and not text.grad[3].any() and image.grad[4].any()
