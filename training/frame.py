"""The frame of every training: plan, agreement of the ranks, model, last checkpoint, steps, result, model.

An objective brings a `Work`, and nothing of what all trainings do alike: where a run resumes, what it tells and saves,
and in which order its files appear.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pairs.errors import PairmillError
from pairs.pretrain import PretrainSpec
from pairs.store import Store
from training import checkpoint
from training.attention import chosen
from training.config import RESULT, UNSEEN, TrainConfig, TrainResult, identity
from training.data import Loader, cache_at
from training.hardware import deterministic, precision
from training.loop import Line, Totals, make_optimizer, train_steps
from training.models.blip import PackedBlip
from training.models.clip import Towers
from training.models.transformer import Transformer, compile_blocks
from training.parallel import whole_state
from training.plan import Cost, Plan
from training.tables import make_plan
from training.teach import Teach

log = logging.getLogger("pairmill.training")
WARM = 5  # steps before a profile begins


@dataclasses.dataclass
class Work:
    """What an objective brings, its modules placed on their ranks. `beside` follows the model and lies in checkpoints
    with it; an `average` there is what is exported. `publish` writes the model's folder from whole weights and the
    facts of its card; `told` are fields of the result."""

    model: Towers | PackedBlip
    beside: dict[str, nn.Module]
    cost: Cost
    teach: Teach
    publish: Callable[[Path, dict[str, Tensor], dict[str, Any]], None]
    loader: Callable[..., Loader] = Loader
    told: dict[str, Any] = dataclasses.field(default_factory=dict)


Begin = Callable[[Store, Plan, int, int, torch.device], Work]


def train(
    config: TrainConfig, spec: PretrainSpec, rank: int, ranks: int, device: torch.device, begin: Begin
) -> TrainResult:
    """Trains this rank's part to the end. `spec` is the config's, with what `begin` wants otherwise."""
    began, out, store = time.perf_counter(), Path(config.out_dir), Store(config.store)
    if ranks > spec.batch_pairs:
        raise PairmillError(
            expected=f"a pair for each rank (pretrain.batch_pairs), {ranks} or more",
            found=f"{spec.batch_pairs} pairs a step for {ranks} ranks",
            remedy="start fewer ranks, or raise batch_pairs",
        )
    plan, left_out = make_plan(store, config.shards, spec, config.apart)
    if ranks > 1:
        _agree(plan.fingerprint)
    work = begin(store, plan, rank, ranks, device)
    model, average = work.model, work.beside.get("average")
    held = nn.ModuleDict({"model": model} | work.beside)
    optimizer = make_optimizer(model, spec)
    for part in model.modules():
        if isinstance(part, Transformer):
            part.remember = spec.activations
    if spec.compile:
        compile_blocks(held)
    own = {"plan": plan.fingerprint} | identity(config)
    start, totals = _resume(out / "checkpoints", held, optimizer, own, rank, ranks)
    dtype = precision(spec, device)
    metrics = Metrics(out / "metrics.jsonl", start, spec.tensorboard) if rank == 0 else None
    if rank == 0:
        checkpoint.check_room(out, held, spec.keep_best)
    saver = checkpoint.Saver(out / "checkpoints", spec.keep_best)
    loader = work.loader(
        plan, store, rank, ranks, work.cost, spec.model.patch_px, spec.jitter, model.form, spec.accumulate,
        spec.token_multiple, spec.steps, spec.loader_workers, cache_at(spec.cache, spec.cache_gb),
    )  # fmt: skip

    def save(step: int) -> None:
        loss = sum(totals.recent) / len(totals.recent) if totals.recent else None
        totals.recent.clear()
        saver.save(held, optimizer, plan.state(step) | own | {"loss": loss, "totals": dataclasses.asdict(totals)})

    with (
        deterministic(spec.deterministic),
        saver,
        profiled(out / "trace.json", 0 if rank else spec.profile_steps) as tick,
    ):

        def told(line: Line) -> None:
            if metrics:  # the other ranks stay silent
                metrics.add(line)
            tick()
            saver.check()

        train_steps(model, optimizer, loader, spec, start, totals, device, dtype, told, save, work.teach, average)
    facts = {
        "spec": spec.model_dump(exclude=UNSEEN), "steps": spec.steps, "precision": str(dtype).removeprefix("torch."),
    } | own  # fmt: skip
    result = TrainResult(
        model=str(out / "model"), fingerprint=config.fingerprint, plan=plan.fingerprint, steps=spec.steps,
        resumed_from=start, pairs=len(plan), left_out=left_out, truncated=plan.tokens.truncated,
        seconds=time.perf_counter() - began, precision=facts["precision"],
        attention=chosen(spec.attention, device.type, dtype), torch=torch.__version__, **totals.figures() | work.told,
    )  # fmt: skip
    weights = whole_state(average or model, keep=rank == 0)
    if rank == 0:
        Store(out).write(RESULT, result.model_dump_json(indent=2))  # before the model, which tells that all is done
        work.publish(out / "model", weights, facts)
    return result


class Metrics:
    """`metrics.jsonl` and standard output, a JSON object per step, and TensorBoard's files beside it if wanted. A
    resumed run cuts off what it will do again. A number that isn't finite becomes null."""

    def __init__(self, path: Path, start: int, tensorboard: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except ValueError:  # the line that a kill cut short
                    break
                if line["step"] < start:
                    kept.append(text)
        Store(path.parent).write(path.name, "".join(text + "\n" for text in kept))
        self._file = path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second

            self._board = SummaryWriter(str(path.parent / "tensorboard"), purge_step=start)

    def add(self, line: dict[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(plain) + "\n")
        for name, value in plain.items():
            if self._board and isinstance(value, int | float):
                self._board.add_scalar(name, value, line["step"])
        say(plain)


@contextlib.contextmanager
def profiled(path: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Traces `steps` steps after `WARM` others, as Chrome and Perfetto read it; yields what to call after each step."""
    if not steps:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    plan = schedule(wait=WARM, warmup=1, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=lambda p: p.export_chrome_trace(str(path))) as profiler:
        yield profiler.step


def _agree(mark: str) -> None:
    """A tombstone that falls between the looks of two ranks gives them different plans."""
    first = torch.tensor(int(mark, 16))
    dist.broadcast(first, 0)
    if int(first) != int(mark, 16):
        raise PairmillError(
            expected="one plan on all ranks",
            found="another one: pairs were forgotten while they started",
            remedy="run the same command again",
        )


def _resume(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, str],
    rank: int,
    ranks: int,
) -> tuple[int, Totals]:
    """The step to go on from and the sums so far. Rank 0, which alone tells sums, picks; the others read the same."""
    found = checkpoint.latest(folder) if rank == 0 else None
    if found and any(found[1].get(name) != value for name, value in identity.items()):
        log.warning("training begins anew: the checkpoints are of other settings, or pairs were forgotten since")
        shutil.rmtree(folder)
        found = None
    step = torch.tensor(found[1]["step"] if found else 0)
    if ranks > 1:
        dist.broadcast(step, 0)
    if int(step):
        checkpoint.restore(folder / f"step-{int(step):08d}", model, optimizer)
        log.info("resumed after step %d", int(step))
    return int(step), Totals(**found[1]["totals"]) if found else Totals()


def say(line: dict[str, Any]) -> None:
    # In one piece, since two processes may write into the same pipe; first ending what a library left unended.
    os.write(1, b"\n" + json.dumps(line).encode() + b"\n")
