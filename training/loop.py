"""The training loop, to be read from top to bottom: batch, loss over all ranks, step, line of metrics.

Loss = global sum / global count; gradients are averaged over ranks, so each rank's part is scaled by their number.
AdamW decays matrices only: not biases, norms, positions or token rows (a row that no text holds must not move).
The schedule is a linear warm-up, then a cosine to zero. A step whose loss or gradient isn't finite is skipped and
counted, on all ranks alike; `PATIENCE` in a row stop the run, and so do damaged images where they
are most. AdamW: arXiv 1711.05101.
"""

import functools
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pairs.errors import PairmillError
from pairs.recipe import PretrainSpec
from training.accumulate import Context, features
from training.data import Batch, Loader
from training.hardware import memory_bytes, peak_flops
from training.models.blip import PackedBlip
from training.models.clip import Towers
from training.objectives import OBJECTIVES, Share
from training.parallel import clip, follow, running
from training.preflight import rehearse

PATIENCE = 10
MAX_LOGIT_SCALE = math.log(100)
Line = dict[str, Any]


@dataclass
class Totals:
    """What a run adds up; sums and counts, divided at the end. Checkpoints hold them, so that a
    resumed run tells of all its steps."""

    damaged: int = 0
    skipped: int = 0
    losses: list[float] = field(default_factory=list)  # the finite ones of the last tenth of the steps
    recent: list[float] = field(default_factory=list)  # the finite ones since the last checkpoint
    pairs: int = 0
    useful: int = 0
    computed: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """What a result tells of them, by its fields' names."""
        return {
            "damaged": self.damaged,
            "skipped": self.skipped,
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "pairs_per_s": self.pairs / self.seconds if self.seconds else None,
            "fill": self.useful / self.computed if self.computed else None,
        }


class Teach(Protocol):
    """What a step computes of a batch: `loss` gives its sum and count (of this rank), what takes the gradient of a
    scaled sum into the weights, and what to tell; `done` follows on a step that was taken."""

    def loss(
        self, run: nn.Module, batch: Batch, step: int, mixed: Context
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], None], Line]: ...

    def done(self) -> None: ...


@dataclass(frozen=True)
class Contrast:
    """Two towers' features, under an objective."""

    objective: str
    rank: int

    def loss(
        self, run: nn.Module, batch: Batch, step: int, mixed: Context
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], None], Line]:
        (image_BE, text_BE, scale, bias), back = features(run, batch.parts, mixed)
        share = Share(batch.valid, batch.same, batch.counts, self.rank)
        total, count = OBJECTIVES[self.objective](image_BE, text_BE, scale, bias, share)
        return total, count, back, {}

    def done(self) -> None:
        pass


def train_steps(
    model: Towers | PackedBlip,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    spec: PretrainSpec,
    start: int,
    totals: Totals,
    device: torch.device,
    dtype: torch.dtype,
    emit: Callable[[Line], None],
    save: Callable[[int], None],
    teach: Teach,
    average: nn.Module | None = None,
) -> None:
    """Steps [start, spec.steps), added to `totals`. `emit` gets a line for each, `save` how many are done, when due.
    `teach` is what the steps compute, `average` a copy of the model that follows it (spec.ema)."""
    ranks, in_a_row = loader.ranks, 0
    lately: deque[tuple[int, int]] = deque(maxlen=PATIENCE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    run = running(model, ranks)
    # No cache: a weight is cast once a pass, and kept casts would be the whole model where FSDP2 holds a block.
    mixed = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    if isinstance(teach, Contrast):  # what it rehearses
        rehearse(run, optimizer, loader, spec, mixed, device)
    began, save_s, peak = time.perf_counter(), 0.0, peak_flops(device, dtype)
    for step, batch in enumerate(_on_device(loader.batches(start, spec.steps), device), start):
        rate = learning_rate(step, spec)
        for group in optimizer.param_groups:
            group["lr"] = rate

        total, count, back, seen = teach.loss(run, batch, step, mixed)

        damaged = sum(batch.damaged.values())
        own = [float(total.detach()), float(count), damaged, batch.useful, batch.computed, loader.wait_s, batch.flops]
        loss_sum, pairs, damaged_sum, useful, all_tokens, wait_s, flops = _sum(own, ranks, device)
        loss = loss_sum / max(pairs, 1)
        lately.append((int(damaged_sum), sum(batch.counts)))
        _check_damage(step, int(pairs), lately)

        optimizer.zero_grad()
        back(total * (ranks / max(pairs, 1)))
        norm = clip(parameters, spec.clip_norm)
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            teach.done()
            with torch.no_grad():
                model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            if average:
                follow(average, model, 1 - spec.ema)
            in_a_row = 0
        else:
            in_a_row += 1
            totals.skipped += 1
            _give_up(in_a_row, step, loss, norm)

        now = time.perf_counter()
        seconds, began = now - began, now
        if math.isfinite(loss):
            totals.recent.append(loss)
            if step >= spec.steps - max(1, spec.steps // 10):
                totals.losses.append(loss)
        totals.damaged += int(damaged_sum)
        totals.pairs, totals.useful = totals.pairs + int(pairs), totals.useful + int(useful)
        totals.computed, totals.seconds = totals.computed + int(all_tokens), totals.seconds + seconds
        emit(
            {
                "step": step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "logit_scale": float(model.logit_scale.detach().exp()),
                "pairs": int(pairs),
                "damaged": int(damaged_sum),
                "pairs_per_s": pairs / seconds,
                "tokens_per_s": useful / seconds,
                "fill": useful / all_tokens,
                "flops_per_s": flops / seconds,
                "mfu": flops / seconds / (ranks * peak) if peak else None,
                "wait_fraction": wait_s / ranks / seconds,
                "save_fraction": save_s / seconds,
                "memory_mb": memory_bytes(device) / 1e6,
                "uids_sha256": loader.plan.digest(step),
            }
            | seen
        )
        save_s = 0.0
        if (step + 1) % spec.checkpoint_every == 0 or step + 1 == spec.steps:
            save(step + 1)
            save_s = time.perf_counter() - now


def make_optimizer(model: nn.Module, spec: PretrainSpec) -> torch.optim.Optimizer:
    """AdamW with weight decay on the matrices of the layers alone."""
    bare = ("embedding", "ln_", "logit_scale", "bias")
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and not any(part in name for part in bare)
        groups.setdefault((decays, isinstance(parameter, DTensor)), []).append(parameter)  # one kernel takes one kind
    settings = [{"params": p, "weight_decay": spec.weight_decay * decays} for (decays, _), p in groups.items()]
    return torch.optim.AdamW(settings, lr=spec.learning_rate, betas=(0.9, spec.beta2), eps=1e-6, fused=True)


def learning_rate(step: int, spec: PretrainSpec) -> float:
    """Linear from 1/warmup of the peak, then a cosine that would reach zero at `steps`."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    done = (step - spec.warmup_steps) / max(1, spec.steps - spec.warmup_steps)
    return spec.learning_rate * (1 + math.cos(math.pi * done)) / 2


def _on_device(batches: Iterator[Any], device: torch.device) -> Iterator[Any]:
    return batches if device.type == "cpu" else (batch.to(device) for batch in batches)


def _sum(values: list[float], ranks: int, device: torch.device) -> list[float]:
    """The values added up over ranks."""
    if ranks == 1:
        return values
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    added: list[float] = sums.tolist()
    return added


def _check_damage(step: int, pairs: int, lately: Collection[tuple[int, int]]) -> None:
    """Stops where a step has no pair left, or the last `PATIENCE` steps fewer than half: damage, not bad luck."""
    damaged, taken = (sum(column) for column in zip(*lately, strict=True))
    if pairs and (len(lately) < PATIENCE or 2 * damaged <= taken):
        return
    raise PairmillError(
        expected="pairs whose images can be decoded",
        found=f"{damaged} of {taken} undecodable in the {len(lately)} steps up to {step}",
        remedy="run `pairmill verify` on the workspace: the training shards are damaged",
    )


def _give_up(in_a_row: int, step: int, loss: float, norm: float) -> None:
    if in_a_row >= PATIENCE:
        raise PairmillError(
            expected="finite losses and gradients",
            found=f"{in_a_row} steps in a row without, the last is {step}: loss {loss}, gradient norm {norm}",
            remedy="lower pretrain.learning_rate or set precision: fp32; the last checkpoint is from before",
        )
