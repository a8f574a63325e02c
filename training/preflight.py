"""What is tried before step 0, so that a run fails in its first seconds or not for these reasons: that all ranks come
and hear each other, and that the largest step fits into memory.

The largest of the steps at hand is run forwards and backwards and no weight moves; what is compiled is compiled by it.
A GPU says when its memory is out; on a CPU the kernel would kill some process, so an estimate is compared first.
Cost: a step, and some milliseconds of collectives.
"""

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from pairs.errors import PairmillError
from pairs.pretrain import PretrainSpec
from pairs.process import free_bytes
from training.accumulate import Context
from training.data import Batch, Loader
from training.hardware import memory_bytes
from training.models.transformer import Transformer
from training.plan import Plan
from training.teach import Teach

log = logging.getLogger("pairmill.training")
MEET_S, HEAR_S = 300.0, 60.0  # within which all ranks come, and a collective of a few bytes ends
LOOKED = 20_000  # pairs in whose steps the largest is looked for
LOOK_S = 0.005
KEPT = {"all": (64, 56), "products": (44, 26), "inputs": (4, 4)}  # bytes a token, layer and unit of width: fp32, bf16


def meet(rank: int, ranks: int, url: str, backend: str, meet_s: float = MEET_S, hear_s: float = HEAR_S) -> None:
    """Joins the process group, then checks an all_reduce and an all_gather of known values. Raises PairmillError, which
    names the ranks that didn't come, or what was heard instead."""
    store, *_ = next(iter(dist.rendezvous(url, rank, ranks, timeout=timedelta(seconds=meet_s))))
    _await(store, "start", rank, ranks, meet_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    _await(store, "connect", rank, ranks, hear_s)
    own = torch.tensor([rank], device="cuda" if "nccl" in backend else "cpu")
    total, each = own.clone(), [torch.empty_like(own) for _ in range(ranks)]
    heard: list[Any]
    try:
        for work in (dist.all_reduce(total, async_op=True), dist.all_gather(each, own, async_op=True)):
            work.wait(timedelta(seconds=hear_s))
        heard = [int(x) for x in [*each, total]]
    except RuntimeError as error:
        heard = [" ".join(str(error).split())[:300]]
    if heard != [*range(ranks), sum(range(ranks))]:
        raise PairmillError(
            expected=f"{ranks} ranks that hear each other's numbers (and their sum) over {backend} within {hear_s:g} s",
            found=f"rank {rank} heard {heard}",
            remedy="see the other ranks' logs, and whether GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME name the network",
        )


def _await(store: dist.Store, mark: str, rank: int, ranks: int, patience_s: float) -> None:
    marks = [f"pairmill/{mark}/{each}" for each in range(ranks)]
    store.set(marks[rank], "here")
    try:
        store.wait(marks, timedelta(seconds=patience_s))
    except RuntimeError as error:
        missing = [str(each) for each, name in enumerate(marks) if not store.check([name])]
        raise PairmillError(
            expected=f"all {ranks} ranks to {mark} within {patience_s:g} s",
            found=f"no sign of rank {', '.join(missing)}",
            remedy="see their logs; with torchrun, start as many processes as the world size says",
        ) from error


def rehearse(
    run: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    teach: Teach,
    spec: PretrainSpec,
    context: Context,
    device: torch.device,
) -> int:
    """Runs the largest step without an update; by how many bytes memory grew at most, which is logged. Raises
    PairmillError where it isn't there, or what is to be compiled can't be. Every rank calls it, as it calls a step."""
    began, trained = time.perf_counter(), [p for p in run.parameters() if p.requires_grad]
    step, free = largest(loader.plan, spec.steps), _free(device)
    batch = loader.load(step)
    too_large = functools.partial(_too_large, step, batch.computed, free, spec)

    def once() -> None:
        total, _, back, _ = teach.loss(run, batch.to(device), step, context)
        back(total)
        for parameter in trained:
            parameter.grad = None

    try:
        moments = [torch.empty_like(p) for p in trained for _ in range(0 if optimizer.state else 2)]
        if device.type == "cpu":
            with context():
                half = torch.is_autocast_enabled("cpu")
            needed = estimate(run, batch, half) + teach.kept(batch, half) + _bytes(moments)
            if needed > free:
                raise too_large(f"it takes about {needed / 1e9:.1f} GB")
            grown = _growth(once)
        else:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            once()
            grown = memory_bytes(device) - before
    except torch.OutOfMemoryError as error:
        raise too_large(" ".join(str(error).split())[:200]) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise PairmillError(
            expected="the model's blocks to be compiled (pretrain.compile)",
            found=" ".join(str(error).split())[:300],
            remedy="mend what it tells, or set compile: false",
        ) from error
    log.info(
        "preflight: the largest step (%d, %d tokens) takes %.0f MB beside the weights, of %.0f MB; %.1f s",
        *(step, batch.computed, grown / 1e6, free / 1e6, time.perf_counter() - began),
    )
    return grown


def largest(plan: Plan, steps: int) -> int:
    """The step with the most tokens, among the first."""

    def tokens(step: int) -> int:
        pairs = ((plan.grid(row), plan.tokens.ids[plan.text(epoch, row)]) for epoch, row in plan.rows(step))
        return sum(h * w + len(ids) for (h, w), ids in pairs)

    return max(range(min(steps, -(-LOOKED // plan.batch_pairs))), key=tokens)


def estimate(run: nn.Module, batch: Batch, half: bool) -> float:
    """Bytes that a step takes on a CPU beside the weights: gradients, and what the blocks of its largest part keep."""
    towers = [(name, m) for name, m in run.named_modules() if isinstance(m, Transformer)]
    most = 0.0
    for images, texts in batch.parts:
        sizes = {True: len(getattr(images, "place", ())), False: len(getattr(texts, "tokens", ()))}
        kept = 0.0
        for name, tower in towers:
            if any(p.requires_grad for p in tower.parameters()):
                width, layers = tower.resblocks[0].attn.out_proj.in_features, len(tower.resblocks)
                kept += sizes["visual" in name] * width * (layers * KEPT[tower.remember][half] + 2 * KEPT["all"][half])
        most = max(most, kept)
    trained = [p for p in run.parameters() if p.requires_grad]
    return most + _bytes(trained) * (1.5 if half else 1.0)  # weights in 16 bit are kept too


def _too_large(step: int, tokens: int, free: float, spec: PretrainSpec, found: str) -> PairmillError:
    blip = spec.objective == "blip"  # which knows no accumulate
    parts = f"spread it over more workers ({spec.workers})" if blip else f"raise accumulate ({spec.accumulate})"
    return PairmillError(
        expected=f"the largest step ({step}: {tokens} tokens on this rank) to fit into {free / 1e9:.1f} GB",
        found=found,
        remedy=f"lower pretrain.batch_pairs ({spec.batch_pairs}), {parts}, or keep less "
        f"for the backward (activations: products or inputs, now {spec.activations})",
    )


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Of this rank's part of each."""
    parts = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
    return sum(x.numel() * x.element_size() for x in parts)


def _free(device: torch.device) -> float:
    """Bytes that this process may yet take; on a CPU, ranks of one machine share them evenly."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return free_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def _growth(work: Callable[[], None]) -> int:
    """The most by which the process grew while `work` ran."""
    before, seen, done = memory_bytes(torch.device("cpu")), [0], threading.Event()

    def look() -> None:
        while not done.wait(LOOK_S):
            seen.append(memory_bytes(torch.device("cpu")) - before)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        work()
    finally:
        done.set()
        looking.join()
    return max(seen)
