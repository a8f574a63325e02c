"""Before step 0: ranks that don't come or don't hear each other are named, and a step too large for memory is told."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pairs.errors import PairmillError
from pairs.pretrain import TowerSpec
from pairs.store import Store
from tests.training.small import MODEL, SPEC, config, shards
from tests.training.test_blip_run import blip
from training import attention, blip_run, launch, preflight
from training.data import Loader
from training.export import build
from training.frame import Work
from training.models.clip import Towers
from training.plan import Cost
from training.run import train_rank
from training.tables import make_plan
from training.teach import Contrast

torch.set_num_threads(1)
CPU = torch.device("cpu")


def _rank(rank: int, root: str, deaf: bool) -> None:
    """One of two ranks; with `deaf`, the second starts, but doesn't come to the collectives."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if deaf and rank:
        wait = preflight._await
        preflight._await = lambda store, mark, *rest: wait(store, mark, *rest) if mark == "start" else os._exit(0)
    try:
        preflight.meet(rank, 2, f"file://{root}/meet", "gloo", hear_s=3)
        told = "met"
    except PairmillError as error:
        told = str(error)
    Path(f"{root}/rank{rank}").write_text(told)
    if told == "met":
        dist.barrier()
    os._exit(0)


@pytest.mark.parametrize("deaf", [False, True])
def test_ranks_hear_each_other_or_say_who_did_not_come(tmp_path: Path, deaf: bool) -> None:
    mp.start_processes(_rank, (str(tmp_path), deaf), nprocs=2, start_method="spawn")
    told = (tmp_path / "rank0").read_text()
    assert "no sign of rank 1" in told if deaf else told == "met"


def test_a_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="no sign of rank 1, 2"):
        preflight.meet(0, 3, f"file://{tmp_path}/meet", "gloo", meet_s=0.5)


def _ready(root: Path, remember: str = "all") -> tuple[Towers, torch.optim.Optimizer, Loader]:
    store = Store(root)
    plan, _ = make_plan(store, shards(store), SPEC)
    towers = {"vision": TowerSpec(layers=4, width=256, heads=4), "text": TowerSpec(layers=4, width=256, heads=4)}
    model = build(MODEL.model_copy(update=towers), 1)
    for tower in (model.visual.transformer, model.transformer):
        tower.remember = remember  # type: ignore[union-attr, assignment]
    model.with_vocabulary(model.token_embedding.weight[torch.from_numpy(plan.tokens.used)])
    loader = Loader(plan, store, 0, 1, Cost((4, 256), (4, 256)), MODEL.patch_px, 0.0)
    return model, torch.optim.AdamW(model.parameters()), loader


def _rehearse(model: Towers, optimizer: torch.optim.Optimizer, loader: Loader) -> int:
    teach = Contrast("clip", 0)
    return preflight.rehearse(model, optimizer, loader, teach, SPEC, lambda: torch.autocast("cpu", enabled=False), CPU)


def test_the_largest_step_is_rehearsed_and_leaves_no_trace(tmp_path: Path) -> None:
    model, optimizer, loader = _ready(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = [loader.load(step).computed for step in range(SPEC.steps)]
    assert loader.load(preflight.largest(loader.plan, SPEC.steps)).computed == max(tokens)
    assert _allocated(lambda: _rehearse(model, optimizer, loader)) > 1e6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer.state and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("remember", ["all", "products", "inputs"])
def test_the_estimate_is_near_what_a_step_takes(tmp_path: Path, remember: str) -> None:
    model, optimizer, loader = _ready(tmp_path, remember)
    batch = loader.load(preflight.largest(loader.plan, SPEC.steps))
    moments = 2 * sum(p.numel() * 4 for p in model.parameters())
    foreseen = moments + preflight.estimate(model, batch, half=False)
    grown = _allocated(lambda: _rehearse(model, optimizer, loader))
    assert 0.7 < foreseen / grown < 1.4


@pytest.mark.parametrize("asked", [["lm"], ["itc", "itm", "lm"]])
def test_so_is_a_blip_s(tmp_path: Path, asked: list[str]) -> None:
    towers = {name: TowerSpec(layers=3, width=128, heads=4) for name in ("vision", "text")}
    cfg = blip(tmp_path, "large", {"losses": asked})
    spec = cfg.spec.model_copy(update={"model": cfg.spec.model.model_copy(update=towers)})
    store = Store(tmp_path)
    plan, _ = make_plan(store, cfg.shards, spec)
    work = blip_run._begin(spec, store, plan, 0, 1, CPU)
    loader = Loader(plan, store, 0, 1, work.cost, MODEL.patch_px, 0.0)
    batch = loader.load(preflight.largest(plan, spec.steps))
    optimizer = torch.optim.AdamW(p for p in work.model.parameters() if p.requires_grad)
    before = {name: value.clone() for name, value in (work.model.state_dict() | _memory(work)).items()}

    def rehearse() -> None:
        context = functools.partial(torch.autocast, "cpu", enabled=False)
        preflight.rehearse(work.model, optimizer, loader, work.teach, spec, context, CPU)

    grown = _allocated(rehearse)
    moments = 2 * sum(p.numel() * 4 for p in work.model.parameters() if p.requires_grad)
    foreseen = moments + preflight.estimate(work.model, batch, half=False) + work.teach.kept(batch, False)
    assert 0.7 < foreseen / grown < 1.5, (foreseen, grown)
    after = work.model.state_dict() | _memory(work)
    assert all(torch.equal(value, before[name]) for name, value in after.items()), "a rehearsal leaves no trace"


def _memory(work: Work) -> dict[str, torch.Tensor]:
    return {f"memory.{k}": v for part in work.beside.values() for k, v in part.state_dict().items()}


def _allocated(work: Any) -> int:
    """The most bytes of tensors that `work` held at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_what_a_blip_does_not_know_is_not_advised() -> None:
    told = str(preflight._too_large(0, 9, 1e9, SPEC.model_copy(update={"objective": "blip", "workers": 3}), "more"))
    assert "workers (3)" in told and "accumulate" not in told


def test_a_step_too_large_is_told_with_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda: 1_000_000)
    with pytest.raises(
        PairmillError, match=r"(?s)tokens on this rank\) to fit into 0\.0 GB.*batch_pairs \(16\).*accumulate"
    ):
        train_rank(config(tmp_path, "large"), 0, 1, CPU)

    def out(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.undo()
    monkeypatch.setattr("training.teach.features", out)
    with pytest.raises(PairmillError, match="Tried to allocate"):
        train_rank(config(tmp_path, "out"), 0, 1, CPU)


def test_a_backend_is_asked_about_the_towers_own_heads() -> None:
    vision = TowerSpec(layers=1, width=64, heads=1)
    text = TowerSpec(layers=1, width=24, heads=2)
    spec = SPEC.model_copy(
        update={"attention": "triton", "model": MODEL.model_copy(update={"vision": vision, "text": text})}
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PairmillError, match="this one is 12 wide"):
        patch.setattr("training.attention.use.interpreted", lambda: True)
        patch.setattr("training.attention._limit", attention._limit.__wrapped__)  # whose answers are kept
        launch.preflight(spec)
