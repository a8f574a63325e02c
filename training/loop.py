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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pairs.errors import PairmillError
from pairs.pretrain import PretrainSpec
from training.data import Batch, Loader
from training.flops import step_flops
from training.hardware import memory_bytes, peak_flops
from training.models.blip import PackedBlip
from training.models.clip import Towers
from training.parallel import clip, follow, running
from training.preflight import rehearse
from training.teach import Teach

PATIENCE = 10
MAX_LOGIT_SCALE = math.log(100)
Line = dict[str, Any]
DAMAGE = {  # why a pair is masked: what was expected, and what to do where most are
    "undecodable": (
        "pairs whose images can be decoded",
        "run `pairmill verify` on the workspace: the training shards are damaged",
    ),
    "no_features": (
        "pairs with finite features in the columns that pretrain.towers names",
        "see which pairs the filters of these columns leave null, and drop those in `keep`, or name other columns",
    ),
}


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
    lately: deque[tuple[int, ...]] = deque(maxlen=PATIENCE)
    parameters = [p for p in model.parameters() if p.requires_grad]
    run = running(model, ranks)
    # No cache: a weight is cast once a pass, and kept casts would be the whole model where FSDP2 holds a block.
    mixed = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)
    rehearse(run, optimizer, loader, teach, spec, mixed, device)
    began, save_s, peak = time.perf_counter(), 0.0, peak_flops(device, dtype)
    batches = loader.batches(start, spec.steps, pin=device.type == "cuda")
    for step, batch in enumerate(_on_device(batches, device), start):
        rate = learning_rate(step, spec)
        for group in optimizer.param_groups:
            group["lr"] = rate

        teach.ready()
        total, count, back, seen = teach.loss(run, batch, step, mixed)

        own = [batch.useful, batch.computed, loader.wait_s, step_flops(model, batch)]
        sums = _sum([total, count], [*own, *(batch.damaged.get(name, 0) for name in DAMAGE)], ranks)
        optimizer.zero_grad()
        back(total * (ranks / sums[1].clamp(min=1)).to(total))
        scale, norm_ = model.logit_scale.detach().exp(), clip(parameters, spec.clip_norm)
        # The one wait for the device in a step.
        norm, scale_, *told = torch.stack([x.double() for x in (norm_, scale, *sums, *seen.values())]).tolist()
        loss_sum, pairs, useful, all_tokens, wait_s, flops, *lost = told[: len(sums)]
        loss = loss_sum / max(pairs, 1)
        lately.append((*map(int, lost), sum(batch.counts)))
        _check_damage(step, int(pairs), lately)

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
        totals.damaged += int(sum(lost))
        totals.pairs, totals.useful = totals.pairs + int(pairs), totals.useful + int(useful)
        totals.computed, totals.seconds = totals.computed + int(all_tokens), totals.seconds + seconds
        emit(
            {
                "step": step,
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "logit_scale": scale_,
                "pairs": int(pairs),
                "damaged": int(sum(lost)),
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
            | dict(zip(seen, told[len(sums) :], strict=True))
            | dict.fromkeys(teach.unmeasured)
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


def _on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches there. A GPU copies each, from pinned memory, while it computes the one before."""
    if device.type == "cpu":
        yield from batches
        return
    side, coming = torch.cuda.Stream(device), deque[tuple[Batch, torch.cuda.Event]]()
    for batch in batches:
        # A batch that was let go leaves its memory to a later one: not before what looked at it has ended.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            coming.append((batch.to(device), side.record_event()))
        if len(coming) > 1:
            yield _arrived(coming, device)
    if coming:
        yield _arrived(coming, device)


def _arrived(coming: deque[tuple[Batch, torch.cuda.Event]], device: torch.device) -> Batch:
    batch, copied = coming.popleft()
    torch.cuda.current_stream(device).wait_event(copied)
    return batch


def _sum(there: Sequence[Tensor], here: Sequence[float], ranks: int) -> Tensor:
    """The values of the device and those of the host, float64, added up over ranks."""
    own = torch.tensor(here, dtype=torch.float64).to(there[0].device, non_blocking=True)
    sums = torch.cat([torch.stack([x.detach().double() for x in there]), own])
    if ranks > 1:
        dist.all_reduce(sums)
    return sums


def _check_damage(step: int, pairs: int, lately: Collection[tuple[int, ...]]) -> None:
    """Stops where a step has no pair left, or the last `PATIENCE` steps fewer than half: damage, not bad luck."""
    *lost, taken = (sum(column) for column in zip(*lately, strict=True))
    if pairs and (len(lately) < PATIENCE or 2 * sum(lost) <= taken):
        return
    of = {reason: count for reason, count in zip(DAMAGE, lost, strict=True) if count}
    expected, remedy = DAMAGE[max(of, key=lambda reason: of[reason])] if of else DAMAGE["undecodable"]
    found = " and ".join(f"{count} of {taken} {reason}" for reason, count in of.items())
    raise PairmillError(
        expected=expected,
        found=f"{found or 'no valid pair'} in the {len(lately)} steps up to {step}",
        remedy=remedy,
    )


def _give_up(in_a_row: int, step: int, loss: float, norm: float) -> None:
    if in_a_row >= PATIENCE:
        raise PairmillError(
            expected="finite losses and gradients",
            found=f"{in_a_row} steps in a row without, the last is {step}: loss {loss}, gradient norm {norm}",
            remedy="lower pretrain.learning_rate or set precision: fp32; the last checkpoint is from before",
        )
