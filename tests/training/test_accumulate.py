"""Parts of a batch, recomputed activations and several ranks, whole or cut, give the gradients of the whole batch on
one."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pairs.store import Store
from tests.training.small import MODEL, SPEC, config, shards
from training.accumulate import features
from training.data import Batch, Loader
from training.export import build, load
from training.objectives import OBJECTIVES, Share
from training.parallel import place, running, whole
from training.plan import Cost
from training.run import train_rank
from training.tables import make_plan

torch.set_num_threads(1)
RATIO = 1e-10
EACH = 9  # parts at most: a pair for each


def batch_of(root: Path, rank: int, ranks: int, accumulate: int, among: int) -> Batch:
    """A rank's batch, damaged so that, dealt to `among` in one part each, the first has one valid pair, and the second
    of four none."""
    store = Store(root)
    plan, _ = make_plan(store, shards(store), SPEC)
    cost = Cost((2, 32), (2, 32))
    batch = Loader(plan, store, rank, ranks, cost, 8, 0.1, accumulate=accumulate).load(1)
    assert len(batch.parts) == min(accumulate, *batch.counts)
    shares = plan.split(1, among, cost)
    damaged = torch.tensor([row for _, row in [*shares[0][1:], *(shares[1] if among == 4 else [])]])
    own = Share(batch.valid, batch.same, batch.counts, rank).own
    batch.valid[:] = ~torch.isin(batch.same[own, 0], damaged)
    return batch


def gradients(
    rank: int,
    ranks: int,
    root: str,
    objective: str,
    accumulate: int,
    among: int,
    remember: str = "all",
    parallel: str = "ddp",
) -> dict[str, torch.Tensor]:
    """The loss and the gradients of one step in float64; rank 0 of several writes them."""
    torch.set_num_threads(1)
    spec = MODEL.model_copy(update={"logit_bias": -3.0 if objective == "siglip" else None})
    model = build(spec, 1).double()
    model.visual.transformer.remember = model.transformer.remember = remember  # type: ignore[union-attr, assignment]
    if ranks > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{root}/meet", rank=rank, world_size=ranks)
    place(model, parallel, ranks, torch.device("cpu"))
    run, batch = running(model, ranks), batch_of(Path(root), rank, ranks, accumulate, among)
    (image_BE, text_BE, scale, bias), back = features(run, batch.parts, contextlib.nullcontext)
    total, count = OBJECTIVES[objective](
        image_BE, text_BE, scale, bias, Share(batch.valid, batch.same, batch.counts, rank)
    )
    sums = torch.stack([total.detach(), count.double()])
    if ranks > 1:
        dist.all_reduce(sums)
    back(total * ranks / sums[1])
    found = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None} | {"loss": sums[0] / sums[1]}
    if ranks > 1:
        if rank == 0:
            torch.save(found, f"{root}/found.pt")
        dist.barrier()
        os._exit(0)  # the interpreter's end may meet gloo's threads (SIGABRT), after all is done
    return found


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], ratio: float = RATIO) -> None:
    assert set(found) == set(expected)
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=ratio, atol=ratio * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("objective", ["clip", "siglip"])
def test_parts_and_recomputed_activations_give_the_whole_batchs_gradients(tmp_path: Path, objective: str) -> None:
    expected = gradients(0, 1, str(tmp_path), objective, 1, 2)
    assert len(expected) > 30
    for parts, remember in ((3, "all"), (1, "inputs"), (1, "products"), (4, "inputs")):
        close(gradients(0, 1, str(tmp_path), objective, parts, 2, remember), expected)


SEVERAL = [  # objective, ranks, parts, what the backward finds, how the model lies on them
    ("clip", 2, 1, "all", "ddp"),
    ("siglip", 2, 3, "all", "ddp"),
    ("siglip", 2, 3, "products", "fsdp"),
]
MORE = [
    ("clip", 2, 1, "inputs", "fsdp"),
    ("clip", 4, 2, "all", "ddp"),
    ("clip", 4, 1, "products", "fsdp"),
    ("clip", 4, EACH, "inputs", "fsdp"),
    ("siglip", 4, 2, "all", "fsdp"),
]


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("objective", "ranks", "parts", "remember", "parallel"),
    [*SEVERAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_so_do_several_ranks(
    tmp_path: Path, objective: str, ranks: int, parts: int, remember: str, parallel: str
) -> None:
    expected = gradients(0, 1, str(tmp_path), objective, 1, ranks)
    given = (ranks, str(tmp_path), objective, parts, ranks, remember, parallel)
    mp.start_processes(gradients, given, nprocs=ranks, start_method="spawn")
    close(torch.load(tmp_path / "found.pt"), expected)


def test_the_average_follows_the_model_and_is_what_is_exported(tmp_path: Path) -> None:
    plain, averaged, frozen = (config(tmp_path, f"ema{ema}", ema=ema) for ema in (0.0, 0.5, 0.999999))
    for cfg in (plain, averaged, frozen):
        train_rank(cfg, 0, 1, torch.device("cpu"))
    first = build(MODEL, SPEC.seed).state_dict()
    weights = [load(Path(cfg.out_dir) / "model")[0].state_dict() for cfg in (plain, averaged, frozen)]
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    moved = [float((w[name] - first[name]).norm()) for w in weights]
    assert moved[0] > moved[1] > 100 * moved[2] > 0
