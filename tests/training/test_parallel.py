"""Whole and cut models: equal steps, checkpoints that go from any number of ranks to any other, one message of all."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from tests.training.small import MODEL, SPEC, config
from training import checkpoint, frame
from training.config import TrainConfig
from training.export import build
from training.hardware import deterministic
from training.loop import make_optimizer
from training.parallel import clip, follow, place, whole
from training.run import train_rank

torch.set_num_threads(1)
UNEVEN = MODEL.model_copy(update={"positions": "factorised", "logit_bias": -3.0})  # its smallest has one row
Held = tuple[torch.nn.Module, torch.optim.Optimizer]


def made(parallel: str, ranks: int, steps: int) -> Held:
    """A model with its average and optimizer after some steps along its own weights, which all layouts take alike."""
    model = build(UNEVEN, 3)
    average = copy.deepcopy(model).requires_grad_(False)
    for module in (model, average):
        place(module, parallel, ranks, torch.device("cpu"))
    optimizer = make_optimizer(model, SPEC)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = p.detach() * 0.5 + 0.1
        optimizer.step()
        follow(average, model, 0.5)
    return torch.nn.ModuleDict({"model": model, "average": average}), optimizer


def everything(held: Held) -> dict[str, torch.Tensor]:
    return {name: whole(value).clone() for name, value in checkpoint.tensors(*held).items()}


def same(held: Held, expected: dict[str, torch.Tensor]) -> None:
    found = everything(held)
    assert set(found) == set(expected) and len(found) > 200
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def _save(root: Path, parallel: str, name: str) -> None:
    held, saver = made(parallel, dist.get_world_size(), 2), checkpoint.Saver(root / name)
    same(held, torch.load(root / "expected.pt"))
    saver.save(*held, {"step": 2})
    saver.wait()


def _load(root: Path, parallel: str, name: str) -> None:
    held = made(parallel, dist.get_world_size(), 1)
    checkpoint.restore(root / name / "step-00000002", *held)
    same(held, torch.load(root / "expected.pt"))


def _clip(root: Path, parallel: str, name: str) -> None:
    held, _ = made(parallel, dist.get_world_size(), 1)
    parameters = [p for p in held["model"].parameters()]  # type: ignore[index]
    norm = clip(parameters, 0.25)
    assert float(norm) == pytest.approx(float(torch.load(root / name)), rel=1e-5)
    assert float(clip(parameters, 1e9)) == pytest.approx(0.25, rel=1e-4)


def _full(root: Path, parallel: str, name: str) -> None:
    """The disk of one rank is full: all are told, the last good one stays."""
    import safetensors.torch

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    held, saver, plain = made(parallel, dist.get_world_size(), 1), checkpoint.Saver(root / name), safetensors.torch.save
    safetensors.torch.save = full if dist.get_rank() else plain
    saver.save(*held, {"step": 3})
    with pytest.raises(PairmillError, match="No space left"):
        saver.wait()
    safetensors.torch.save = plain
    dist.barrier()
    assert [path.name for path in (root / name).iterdir()] == ["step-00000002"]


def _train(root: Path, parallel: str, name: str) -> None:
    cfg = TrainConfig.model_validate_json((root / name).read_text())
    train_rank(cfg, dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


JOBS = {"save": _save, "load": _load, "clip": _clip, "full": _full, "train": _train}


def work(rank: int, ranks: int, root: str, jobs: list[tuple[str, str, str]]) -> None:
    """One of `ranks` that do the jobs (what, how the model lies, name) one after the other."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{root}/meet{ranks}", rank=rank, world_size=ranks)
    for what, parallel, name in jobs:
        JOBS[what](Path(root), parallel, name)
    dist.barrier()
    os._exit(0)  # the interpreter's end may meet gloo's threads (SIGABRT), after all is done


def on(ranks: int, root: Path, *jobs: tuple[str, str, str]) -> None:
    mp.start_processes(work, (ranks, str(root), list(jobs)), nprocs=ranks, start_method="spawn")


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_a_checkpoint_goes_from_any_number_of_ranks_to_any_other(tmp_path: Path) -> None:
    alone = made("ddp", 1, 2)
    torch.save(everything(alone), tmp_path / "expected.pt")
    checkpoint.save(tmp_path / "one", *alone, {"step": 2})
    torch.save(clip(list(made("ddp", 1, 1)[0]["model"].parameters()), 0.25), tmp_path / "norm.pt")  # type: ignore[index]
    moves = [("load", "one"), ("save", "cut"), ("full", "cut"), ("clip", "norm.pt")]
    on(2, tmp_path, *((what, "fsdp", name) for what, name in moves), ("save", "ddp", "whole"))
    moves = [("load", "cut"), ("load", "whole"), ("save", "four")]
    on(4, tmp_path, *((what, "fsdp", name) for what, name in moves), ("load", "ddp", "cut"))
    for name in ("cut", "whole", "four"):
        held = made("fsdp", 1, 0)
        checkpoint.restore(tmp_path / name / "step-00000002", *held)
        same(held, torch.load(tmp_path / "expected.pt"))


def _losses(cfg: TrainConfig) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(cfg.out_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(240)
@pytest.mark.slow
def test_a_training_begun_cut_over_two_ranks_ends_on_one(tmp_path: Path) -> None:
    given: dict[str, Any] = {"accumulate": 2, "ema": 0.5, "activations": "inputs", "keep_best": True}
    alone, two = (config(tmp_path, name, **given, parallel="fsdp") for name in ("alone", "two"))
    train_rank(alone, 0, 1, torch.device("cpu"))
    (tmp_path / "two.json").write_text(two.model_dump_json())
    on(2, tmp_path, ("train", "fsdp", "two.json"))
    assert _losses(two) == pytest.approx(_losses(alone), rel=1e-4)
    folder = Path(two.out_dir) / "checkpoints"
    checkpoint.shutil.rmtree(folder / "step-00000008")
    (Path(two.out_dir) / "model" / "model_card.json").unlink()
    again = train_rank(two, 0, 1, torch.device("cpu"))
    assert again.resumed_from == 6 and _losses(two) == pytest.approx(_losses(alone), rel=1e-4)
    assert again.loss == pytest.approx(_losses(alone)[-1], rel=1e-4)


@pytest.mark.timeout(240)
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_four_ranks_resume_to_the_same_bytes(tmp_path: Path, parallel: str) -> None:
    cfg = config(tmp_path, "four", parallel=parallel)
    (tmp_path / "four.json").write_text(cfg.model_dump_json())
    on(4, tmp_path, ("train", parallel, "four.json"))
    expected, model = _losses(cfg), Path(cfg.out_dir) / "model"
    before = content_hash(model)
    checkpoint.shutil.rmtree(Path(cfg.out_dir) / "checkpoints" / "step-00000008")
    (tmp_path / "meet4").unlink(missing_ok=True)
    on(4, tmp_path, ("train", parallel, "four.json"))
    assert _losses(cfg) == expected and content_hash(model) == before
    assert json.loads((Path(cfg.out_dir) / "result.json").read_text())["resumed_from"] == 6


def test_more_ranks_than_pairs_are_told(tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="17 ranks"):
        train_rank(config(tmp_path, "many"), 0, 17, torch.device("cpu"))


def test_deterministic_runs_are_equal_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(frame, "say", lambda line: seen.append(torch.are_deterministic_algorithms_enabled()))
    first, second = (config(tmp_path, name, deterministic=True, steps=4) for name in ("first", "second"))
    results = [train_rank(cfg, 0, 1, torch.device("cpu")) for cfg in (first, second)]
    assert content_hash(Path(results[0].model)) == content_hash(Path(results[1].model))
    assert _losses(first) == _losses(second)
    assert seen == [True] * 8 and not torch.are_deterministic_algorithms_enabled()
    with deterministic(True), pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.ones(2))
