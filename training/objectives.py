"""Objectives: features of this rank → (sum, count). The loop divides the global sum by the global count.

`clip` is InfoNCE over all ranks, `siglip` a sigmoid for each image and text, whose logits are made a chunk at a time,
with their gradients, so that memory is bounded by one chunk whatever the batch. Features are gathered with their
gradients: the gather's backward sums over ranks what each rank's part of the loss says about a feature. A mean of
per-rank means would be wrong as soon as ranks hold unequal counts. Pairs of one text (or one pair met twice) are not
negatives of each other: a caption shared by two images is right for both, and pushing them apart would teach noise.
Cost: one gather of (B, 2·E) each way; logits of (B / ranks, B). CLIP: arXiv 2103.00020. SigLIP: arXiv 2303.15343.

Legend: B pairs of this rank, G of all ranks, E embedding width, C texts of a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # texts whose logits `siglip` holds at a time


@dataclass(frozen=True)
class Share:
    """Which pairs a rank holds. `counts` are the ranks' numbers of pairs; `same` (G, 2) holds row and text of all G
    pairs, in order of rank: two that share either are not negatives of each other."""

    valid_B: Tensor  # bool; a pair that isn't is neither row nor negative
    same: Tensor
    counts: Sequence[int]
    rank: int

    @property
    def own(self) -> slice:
        return slice(sum(self.counts[: self.rank]), sum(self.counts[: self.rank + 1]))


class Objective(Protocol):
    """Normalised features, the logit scale (> 0) and bias (None where the model has none) → sum and count."""

    def __call__(
        self, image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor | None, share: Share
    ) -> tuple[Tensor, Tensor]: ...


def clip(image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor | None, share: Share) -> tuple[Tensor, Tensor]:
    """Sum over this rank's valid pairs of the mean of both cross-entropies, and their count. A bias changes nothing."""
    own, valid_B = share.own, share.valid_B
    all_images, all_texts = gather(torch.cat([image_BE, text_BE], 1), share.counts, share.rank).chunk(2, 1)
    place = torch.arange(own.start, own.stop, device=image_BE.device)
    others = (share.same[own, None] == share.same).any(-1) | ~_all_valid(share, image_BE)
    others[torch.arange(len(place), device=place.device), place] = False
    total = image_BE.new_zeros(())
    for query, keys in ((image_BE, all_texts), (text_BE, all_images)):
        logits = (scale * query @ keys.T).masked_fill(others, -torch.inf)
        total = total + (F.cross_entropy(logits, place, reduction="none") * valid_B).sum() / 2
    return total, valid_B.sum()


def siglip(
    image_BE: Tensor, text_BE: Tensor, scale: Tensor, bias: Tensor | None, share: Share
) -> tuple[Tensor, Tensor]:
    """Sum over this rank's valid images and all ranks' valid texts of the logistic loss, and the images' number."""
    assert bias is not None, "siglip needs a model with a logit bias"
    all_texts = gather(text_BE, share.counts, share.rank)
    total: Tensor = _Sigmoid.apply(image_BE, all_texts, scale, bias, share, _all_valid(share, image_BE), CHUNK)
    return total, share.valid_B.sum()


def _all_valid(share: Share, like: Tensor) -> Tensor:
    return gather(share.valid_B.to(like)[:, None], share.counts, share.rank)[:, 0] > 0.5


class _Sigmoid(torch.autograd.Function):
    """The loss is a sum over texts, so each chunk's gradient is known at once: only gradients outlive their chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        image_BE: Tensor,
        text_GE: Tensor,
        scale: Tensor,
        bias: Tensor,
        share: Share,
        valid_G: Tensor,
        chunk: int,
    ) -> Tensor:
        own, total = share.own, image_BE.new_zeros(())
        d_image, d_text = torch.zeros_like(image_BE), torch.zeros_like(text_GE)
        d_scale, d_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        rows = torch.arange(own.start, own.stop, device=image_BE.device)
        for start in range(0, len(text_GE), chunk):
            part = slice(start, min(start + chunk, len(text_GE)))
            cosine_BC = image_BE @ text_GE[part].T
            match = rows[:, None] == torch.arange(part.start, part.stop, device=rows.device)
            counted = match | ~(share.same[own, None] == share.same[part]).any(-1)
            counted &= share.valid_B[:, None] & valid_G[part]
            sign_BC = torch.where(match, 1.0, -1.0).to(cosine_BC)
            wrong_BC = -sign_BC * (scale * cosine_BC + bias)
            total += (F.softplus(wrong_BC) * counted).sum()
            d_logit_BC = -sign_BC * wrong_BC.sigmoid() * counted
            d_image += scale * d_logit_BC @ text_GE[part]
            d_text[part] = scale * d_logit_BC.T @ image_BE
            d_scale += (d_logit_BC * cosine_BC).sum()
            d_bias += d_logit_BC.sum()
        ctx.save_for_backward(d_image, d_text, d_scale, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        d_image, d_text, d_scale, d_bias = (grad * each for each in ctx.saved_tensors)
        return d_image, d_text, d_scale, d_bias, None, None, None


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


OBJECTIVES: dict[str, Objective] = {"clip": clip, "siglip": siglip}
