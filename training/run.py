"""A training as a process: `python -m training.run JOB.json`, alone, by `training.launch` or under torchrun.

The job is a `TrainConfig`, of which this is one rank, or a `BlipJob`, which has one process. Ranks come from torchrun's
variables (RANK, WORLD_SIZE, LOCAL_RANK); they meet at PAIRMILL_RENDEZVOUS, or where torchrun says. Rank 0 writes
metrics, checkpoints and the model, and a JSON line for each step to standard output.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter

from pairs.errors import PairmillError
from pairs.pretrain import PretrainSpec
from pairs.store import Store
from training import checkpoint, export
from training.attention import chosen
from training.columns import make_loader, start_model
from training.config import RESULT, UNSEEN, BlipJob, BlipResult, TrainConfig, TrainResult, identity
from training.data import cache_at
from training.hardware import deterministic
from training.loop import Totals, make_optimizer, train_steps
from training.models.transformer import Transformer, compile_blocks
from training.parallel import place, whole_state
from training.plan import Cost
from training.preflight import meet
from training.tables import make_plan

log = logging.getLogger("pairmill.training")
WARM = 5  # steps before a profile begins
JOBS: TypeAdapter[TrainConfig | BlipJob] = TypeAdapter(TrainConfig | BlipJob)


def main(path: str) -> int:
    """Does this process's part; 0 when the work is done, 2 after a user's error, which is printed as a JSON line."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    job = JOBS.validate_json(Path(path).read_text())
    try:
        result = train_pair(job) if isinstance(job, BlipJob) else _train(job)(job, rank, ranks, _join(rank, ranks))
        if rank == 0:
            _say({"done": result.model_dump(mode="json")})
        if ranks > 1:
            dist.barrier()
            dist.destroy_process_group()
        return 0
    except PairmillError as error:
        _say({"error": {"expected": error.expected, "found": error.found, "remedy": error.remedy}})
        return 2


def _train(config: TrainConfig) -> Callable[[TrainConfig, int, int, torch.device], TrainResult]:
    if config.spec.objective != "blip":
        return train_rank
    from training.blip_run import train_blip_rank  # transformers: seconds

    return train_blip_rank


def train_pair(job: BlipJob) -> BlipResult:
    """Captioner and match filter."""
    from training.blip import train_blip  # transformers: seconds
    from training.blip_data import trusted_pairs

    torch.set_num_threads(1)  # the two train beside each other
    counts: Counter[str] = Counter()
    result = train_blip(trusted_pairs(job, counts), job.spec, Path(job.out_dir), _say)
    del counts["read"]
    return result.model_copy(update={"left_out": dict(counts) | result.left_out})


def train_rank(config: TrainConfig, rank: int, ranks: int, device: torch.device) -> TrainResult:
    """Plan, model, last checkpoint, steps, export."""
    began, spec, out = time.perf_counter(), config.spec, Path(config.out_dir)
    if ranks > spec.batch_pairs:
        raise PairmillError(
            expected=f"a pair for each rank (pretrain.batch_pairs), {ranks} or more",
            found=f"{spec.batch_pairs} pairs a step for {ranks} ranks",
            remedy="start fewer ranks, or raise batch_pairs",
        )
    store = Store(config.store)
    plan, left_out = make_plan(store, config.shards, spec, config.apart)
    if ranks > 1:
        _agree(plan.fingerprint)
    model, columns = start_model(store, config, plan)
    average = copy.deepcopy(model).requires_grad_(False) if spec.ema else None
    for module in (model, average) if average else (model,):
        place(module, spec.parallel, ranks, device)
    held = torch.nn.ModuleDict({"model": model, "average": average} if average else {"model": model})
    optimizer = make_optimizer(model, spec)
    own = {"plan": plan.fingerprint} | identity(config)
    for part in model.modules():
        if isinstance(part, Transformer):
            part.remember = spec.activations
    if spec.compile:
        compile_blocks(held)
    start, totals = _resume(out / "checkpoints", held, optimizer, own, rank, ranks)
    dtype = precision(spec, device)
    metrics = Metrics(out / "metrics.jsonl", start, spec.tensorboard) if rank == 0 else None
    if rank == 0:
        checkpoint.check_room(out, held, spec.keep_best)
    saver = checkpoint.Saver(out / "checkpoints", spec.keep_best)

    def save(step: int) -> None:
        loss = sum(totals.recent) / len(totals.recent) if totals.recent else None
        totals.recent.clear()
        facts = plan.state(step) | own | {"loss": loss, "totals": dataclasses.asdict(totals)}
        saver.save(held, optimizer, facts)

    m = spec.model
    cost = Cost((m.vision.layers, m.vision.width), (m.text.layers, m.text.width))
    loader = make_loader(columns)(
        plan,
        store,
        rank,
        ranks,
        cost,
        m.patch_px,
        spec.jitter,
        model.form,
        spec.accumulate,
        spec.token_multiple,
        spec.steps,
        spec.loader_workers,
        cache_at(spec.cache, spec.cache_gb),
    )
    emit = metrics.add if metrics else lambda line: None  # the other ranks stay silent
    traced = spec.profile_steps if rank == 0 else 0
    with deterministic(spec.deterministic), saver, profiled(out / "trace.json", traced) as tick:

        def told(line: dict[str, Any]) -> None:
            emit(line)
            tick()
            saver.check()

        train_steps(model, optimizer, loader, spec, start, totals, device, dtype, told, save, average)
    facts: dict[str, Any] = {
        "spec": spec.model_dump(exclude=UNSEEN),
        "steps": spec.steps,
        "precision": str(dtype).removeprefix("torch."),
    } | own
    result = TrainResult(
        model=str(out / "model"),
        fingerprint=config.fingerprint,
        plan=plan.fingerprint,
        steps=spec.steps,
        resumed_from=start,
        pairs=len(plan),
        left_out=left_out,
        truncated=plan.tokens.truncated,
        seconds=time.perf_counter() - began,
        precision=facts["precision"],
        attention=chosen(spec.attention, device.type, dtype),
        torch=torch.__version__,
        **totals.figures(),
    )
    weights = whole_state(average or model, keep=rank == 0)
    if rank == 0:
        Store(out).write(RESULT, result.model_dump_json(indent=2))  # before the model, which tells that all is done
        export.save_trained(out / "model", spec, weights, plan.tokens.used, facts)
    return result


def precision(spec: PretrainSpec, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. `auto`: bfloat16 where the hardware multiplies it, float32 elsewhere; logged."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported()
    else:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        able = any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    if spec.precision == "bf16" and not able:
        raise PairmillError(
            expected="hardware that multiplies bfloat16 (precision: bf16)",
            found=f"none on this {device.type}",
            remedy="set precision: auto or fp32",
        )
    dtype = torch.bfloat16 if spec.precision != "fp32" and able else torch.float32
    log.info("precision: %s on %s", dtype, device.type)
    return dtype


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
        _say(plain)


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


def check_gpus(workers: int) -> None:
    """Raises PairmillError where there are GPUs, but fewer than workers."""
    if torch.cuda.is_available() and workers > torch.cuda.device_count():
        raise PairmillError(
            expected=f"a GPU for each worker (pretrain.workers), {workers} or more",
            found=str(torch.cuda.device_count()),
            remedy="set workers to the number of GPUs, or hide them all (CUDA_VISIBLE_DEVICES=) to train on the CPU",
        )


def _join(rank: int, ranks: int) -> torch.device:
    cuda = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    check_gpus(local + 1)
    if not cuda:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or max(1, (os.cpu_count() or 1) // ranks))
    if cuda:
        torch.cuda.set_device(local)
    if ranks > 1:
        url = os.environ.get("PAIRMILL_RENDEZVOUS", "env://")
        meet(rank, ranks, url, "cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def _say(line: dict[str, Any]) -> None:
    # In one piece, since two processes may write into the same pipe; first ending what a library left unended.
    os.write(1, b"\n" + json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
