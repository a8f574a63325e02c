"""What is tried before step 0, so that a run fails in its first seconds or not for these reasons: that all ranks come
and hear each other, and that the largest step fits into memory.

The largest step is run forwards and backwards on zeros: nothing is read and no weight moves; what is compiled is
compiled by it. A GPU says when its memory is out. On a CPU the kernel would kill some process, so an eighth of the step
is measured first. Cost: a step and an eighth, and some milliseconds of collectives.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from cluster.guard import free_bytes
from pairs.errors import PairmillError
from pairs.recipe import PretrainSpec
from training.accumulate import Part, features
from training.data import Loader
from training.hardware import memory_bytes
from training.objectives import OBJECTIVES, Share
from training.packing import pack_images, pack_texts
from training.plan import Plan

log = logging.getLogger("pairmill.training")
MEET_S, HEAR_S = 300.0, 60.0  # within which all ranks come, and a collective of a few bytes ends
SHARE = 8  # the part of a step that is measured before the whole
LOOK_S = 0.005
Context = Callable[[], AbstractContextManager[Any]]


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
    spec: PretrainSpec,
    context: Context,
    device: torch.device,
) -> int:
    """Runs the largest step on zeros; its peak in bytes, which is logged. Raises PairmillError where memory doesn't do,
    or what is to be compiled can't be. Every rank calls it: gradients are exchanged as in any step."""
    began, trained = time.perf_counter(), [p for p in run.parameters() if p.requires_grad]
    moments = [torch.empty_like(p) for p in trained for _ in range(0 if optimizer.state else 2)]
    step, free = largest(loader.plan, spec.steps), _free(device)
    parts, whole = blank(loader, step)
    tokens = _tokens(parts)

    def once(parts: list[Part], share: Share) -> None:
        moved = [(images.to(device), texts.to(device)) for images, texts in parts]
        on = Share(share.valid_B.to(device), share.same.to(device), share.counts, share.rank)
        found, back = features(run, moved, context)
        back(OBJECTIVES[spec.objective](*found, on)[0])
        for parameter in trained:
            parameter.grad = None

    def too_large(found: str) -> PairmillError:
        return PairmillError(
            expected=f"the largest step ({step}, {tokens} tokens on this rank) to fit into {free / 1e9:.1f} GB",
            found=found,
            remedy=f"lower pretrain.batch_pairs ({spec.batch_pairs}), raise accumulate ({spec.accumulate}), or have less "
            f"kept for the backward (activations: products or inputs; now {spec.activations})",
        )

    try:
        if device.type == "cpu":
            few, share = blank(loader, step, SHARE)
            grown = _growth(lambda: once(few, share))
            fixed = sum(p.numel() * p.element_size() for p in trained)  # gradients; as much for each moment
            needed = (1 + len(moments) // max(1, len(trained))) * fixed + max(0, grown - fixed) * tokens / _tokens(few)
            if needed > free:
                raise too_large(f"it takes about {needed / 1e9:.1f} GB, by {_tokens(few)} of its tokens")
            peak = _growth(lambda: once(parts, whole))
        else:
            once(parts, whole)
            peak = memory_bytes(device)
    except torch.OutOfMemoryError as error:
        raise too_large(" ".join(str(error).split())[:200]) from error
    except torch._dynamo.exc.TorchDynamoException as error:
        raise PairmillError(
            expected="the model's blocks to be compiled (pretrain.compile)",
            found=" ".join(str(error).split())[:300],
            remedy="mend what it tells, or set compile: false",
        ) from error
    log.info("preflight: the largest step, %d tokens, takes %.0f of %.0f MB; %.1f s", tokens, peak / 1e6, free / 1e6,
             time.perf_counter() - began)  # fmt: skip
    return peak


def largest(plan: Plan, steps: int) -> int:
    """The step below `steps` with the most tokens; of the first epoch's, as later ones differ by chance alone."""
    sizes, place = np.unique(np.stack([plan.widths, plan.heights]), axis=1, return_inverse=True)
    cells = np.array([np.prod(plan.grid(int(np.flatnonzero(place == i)[0]))) for i in range(sizes.shape[1])])
    lengths = np.array([len(ids) for ids in plan.tokens.ids])
    tokens = cells[place] + lengths[[texts[0] for texts in plan.texts]]
    first = tokens[plan.order(0)][: steps * plan.batch_pairs]
    return int(np.add.reduceat(first, np.arange(0, len(first), plan.batch_pairs)).argmax())


def blank(loader: Loader, step: int, share: int = 1) -> tuple[list[Part], Share]:
    """The first of `share` shares of this rank's batch, in its parts, with zeros for pixels and tokens."""
    plan, n = loader.plan, loader.accumulate
    split = [own[: max(1, len(own) // share)] for own in plan.split(step, loader.ranks, loader.cost)]
    portions = [[own[i::n] for i in range(n) if own[i::n]] for own in split]
    same = torch.tensor([[row, plan.text(e, row)] for rank in portions for part in rank for e, row in part])
    counts = [len(own) for own in split]
    valid = torch.ones(counts[loader.rank], dtype=torch.bool)
    return [_part(loader, pairs) for pairs in portions[loader.rank]], Share(valid, same, counts, loader.rank)


def _part(loader: Loader, pairs: list[tuple[int, int]]) -> Part:
    plan = loader.plan
    grids = [plan.grid(row) for _, row in pairs]
    cells = [torch.arange(max(1, round(h * w * (1 - loader.dropout)))) for h, w in grids]
    patches = [torch.zeros(len(kept), 3 * loader.patch_px**2, dtype=torch.uint8) for kept in cells]
    texts = [torch.zeros(len(plan.tokens.ids[plan.text(e, row)]), dtype=torch.int64) for e, row in pairs]
    images = pack_images(patches, grids, loader.form, cells, loader.multiple)
    return images, pack_texts(texts, loader.form, loader.multiple)


def _tokens(parts: list[Part]) -> int:
    return sum(len(images.place) + len(texts.tokens) for images, texts in parts)


def _free(device: torch.device) -> float:
    """Bytes that this process may yet take; on a CPU, ranks of one machine share them evenly."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
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
