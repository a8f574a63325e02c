"""Objectives: features of this rank → (sum, count). The loop divides the global sum by the global count.

`clip` is InfoNCE over all ranks. Features are gathered with their gradients: the gather's backward sums
over ranks what each rank's part of the loss says about a feature. A mean of per-rank means would be wrong
as soon as ranks hold unequal counts. Pairs of one text (or one pair met twice) are not negatives of each
other: a caption shared by two images is right for both, and pushing them apart would teach noise.
Cost: one gather of (B, 2·E) each way; logits of (B / ranks, B). CLIP: arXiv 2103.00020.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def clip(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor, valid_B: Tensor, same: Tensor, counts: Sequence[int], rank: int
) -> tuple[Tensor, Tensor]:
    """Sum over this rank's valid pairs of the mean of both cross-entropies, and their count.

    `counts` are the ranks' numbers of pairs; `same` (G, 2) holds row and text of all G pairs, in order of rank: two
    that share either are not negatives of each other. Pairs that aren't valid are neither rows nor negatives.
    """
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    all_images, all_texts = gather(torch.cat([image_BE, text_BE], 1), counts, rank).chunk(2, 1)
    all_valid = gather(valid_B.to(image_BE)[:, None], counts, rank)[:, 0] > 0.5
    place = torch.arange(own.start, own.stop, device=image_BE.device)
    others = (same[own, None] == same).any(-1) | ~all_valid
    others[torch.arange(len(place), device=place.device), place] = False
    total = image_BE.new_zeros(())
    for query, keys in ((image_BE, all_texts), (text_BE, all_images)):
        logits = (scale * query @ keys.T).masked_fill(others, -torch.inf)
        total = total + (F.cross_entropy(logits, place, reduction="none") * valid_B).sum() / 2
    return total, valid_B.sum()


def gather(x_BE: Tensor, counts: Sequence[int], rank: int) -> Tensor:
    """All ranks' rows in order of rank, with gradients; ranks may hold unequal counts."""
    if len(counts) == 1:
        return x_BE
    out: Tensor = _Gather.apply(x_BE, tuple(counts), rank)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BE: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        most = max(counts)
        padded = F.pad(x_BE, (0, 0, 0, most - len(x_BE))).contiguous()  # collectives take equal shapes
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_GE: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        grad_GE = grad_GE.contiguous()
        dist.all_reduce(grad_GE)
        start = sum(ctx.counts[: ctx.rank])
        return grad_GE[start : start + ctx.counts[ctx.rank]], None, None
