"""One rank of a training run: `python -m training.run CONFIG.json`, alone, by `training.launch` or under torchrun.

Ranks come from torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK); they meet at PAIRMILL_RENDEZVOUS, or where
torchrun says. Rank 0 writes metrics, checkpoints and the model, and a JSON line for each step to standard output.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pairs.errors import PairmillError
from pairs.process import die_with_parent
from pairs.recipe import PretrainSpec
from pairs.store import Store
from training import checkpoint, export
from training.attention import chosen
from training.config import RESULT, TrainConfig, TrainResult
from training.data import Loader
from training.loop import Totals, make_optimizer, train_steps
from training.models.clip import WordHead
from training.plan import Cost
from training.tables import make_plan

log = logging.getLogger("pairmill.training")


def main(path: str) -> int:
    """Runs this rank; 0 when the work is done, 2 after a user's error, which is printed as a JSON line."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stderr)
    if parent := os.environ.get("PAIRMILL_PARENT"):
        die_with_parent(int(parent))
    try:
        config = TrainConfig.model_validate_json(Path(path).read_text())
        device = _join(rank, ranks)
        result = train_rank(config, rank, ranks, device)
        if rank == 0:
            _say({"done": result.model_dump()})
        if ranks > 1:
            dist.barrier()
            dist.destroy_process_group()
        return 0
    except PairmillError as error:
        _say({"error": {"expected": error.expected, "found": error.found, "remedy": error.remedy}})
        return 2


def train_rank(config: TrainConfig, rank: int, ranks: int, device: torch.device) -> TrainResult:
    """Plan, model, last checkpoint, steps, export."""
    began, spec, out = time.perf_counter(), config.spec, Path(config.out_dir)
    store = Store(config.store)
    plan, left_out = make_plan(store, config.shards, spec, config.apart)
    if ranks > 1:
        _agree(plan.fingerprint)
    model = export.build(spec.model, spec.seed, spec.attention)
    model.with_vocabulary(model.token_embedding.weight[torch.from_numpy(plan.tokens.used)])
    if spec.word_weight:
        model.word_head = WordHead(spec.model.vision.width, torch.from_numpy(plan.tokens.shares()))
    model.to(device)
    optimizer = make_optimizer(model, spec)
    identity = {"plan": plan.fingerprint, "config": config.fingerprint}
    start, totals = _resume(out / "checkpoints", model, optimizer, identity, rank, ranks)
    dtype = precision(spec, device)
    metrics = Metrics(out / "metrics.jsonl", start) if rank == 0 else None

    def save(step: int) -> None:
        if rank == 0:
            facts = plan.state(step) | identity | {"totals": dataclasses.asdict(totals)}
            checkpoint.save(out / "checkpoints", model, optimizer, facts)

    m = spec.model
    cost = Cost((m.vision.layers, m.vision.width), (m.text.layers, m.text.width))
    loader = Loader(plan, store, rank, ranks, cost, m.patch_px, spec.jitter, spec.row_tokens)
    emit = metrics.add if metrics else _nothing
    train_steps(model, optimizer, plan, loader, spec, start, totals, device, dtype, emit, save)
    facts = {
        "spec": spec.model_dump(exclude={"workers", "checkpoint_every"}),
        "plan": plan.fingerprint,
        "config": config.fingerprint,
        "steps": spec.steps,
        "precision": str(dtype).removeprefix("torch."),
    }
    ran_with = facts | {"attention": chosen(spec.attention, device.type, dtype)}
    result = _result(config, plan.fingerprint, ran_with, totals, start, len(plan), left_out, plan.tokens.truncated)
    result = result.model_copy(update={"seconds": time.perf_counter() - began})
    if rank == 0:
        Store(out).write(RESULT, result.model_dump_json(indent=2))  # before the model, which tells that all is done
        weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("word_head")}
        rows = weights["token_embedding.weight"]
        weights["token_embedding.weight"] = export.whole_table(m, spec.seed, plan.tokens.used, rows)
        export.save(out / "model", m, weights, facts)
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
    """`metrics.jsonl` and standard output, a JSON object per step. A resumed run cuts off what it will do again.
    A number that isn't finite becomes null."""

    def __init__(self, path: Path, start: int) -> None:
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

    def add(self, line: dict[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(plain) + "\n")
        _say(plain)


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


def _result(
    config: TrainConfig,
    plan: str,
    facts: dict[str, Any],
    totals: Totals,
    start: int,
    pairs: int,
    left_out: dict[str, int],
    truncated: int,
) -> TrainResult:
    return TrainResult(
        model=str(Path(config.out_dir) / "model"),
        fingerprint=config.fingerprint,
        plan=plan,
        steps=config.spec.steps,
        resumed_from=start,
        pairs=pairs,
        left_out=left_out,
        truncated=truncated,
        damaged=totals.damaged,
        skipped=totals.skipped,
        loss=sum(totals.losses) / len(totals.losses) if totals.losses else None,
        seconds=0.0,
        pairs_per_s=totals.pairs / totals.seconds if totals.seconds else None,
        fill=totals.useful / totals.computed if totals.computed else None,
        precision=str(facts["precision"]),
        attention=str(facts["attention"]),
        torch=torch.__version__,
    )


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
    if ranks > 1:
        meet = os.environ.get("PAIRMILL_RENDEZVOUS", "env://")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", init_method=meet, rank=rank, world_size=ranks)
    if cuda:
        torch.cuda.set_device(local)
    return torch.device("cuda", local) if cuda else torch.device("cpu")


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _nothing(line: dict[str, Any]) -> None:
    """The other ranks stay silent."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
