"""What BLIP's contrast compares with: features of slowly following encoders, of this step and of earlier ones.

`Memory` holds a copy of image tower and reading text tower that follows the model (m·copy + (1 - m)·model, before each
step), and a ring of the last features of the copy. The ring is one for all ranks: every rank holds all of it, in an
order that hangs on the pairs alone, and takes in the whole step's features. So it means the same on another number of
ranks, and it lies in the state dict with the weights. It starts empty, where the authors' starts as random vectors.
Cost: one more forward pass of both towers, and 2·E floats for each place. MoCo: arXiv 1911.05722, ALBEF: 2107.07651.

Legend: B pairs of this rank, G of all ranks, Q places of the ring, K = G + Q, E width of the common space.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from training.models.blip import PackedBlip, Stream
from training.packing import PackedImages
from training.parallel import local

UNREAD = ("match_head", "word_dense", "word_ln", "word_bias", "logit_scale", "write", "ln_write", "cross", "ln_cross")


@dataclass(frozen=True)
class Keys:
    """What is compared with: the step's G pairs in their order, then the ring's. `same` holds row and text of each;
    what isn't `valid` is empty or damaged."""

    image_KE: Tensor
    text_KE: Tensor
    same_K2: Tensor
    valid_K: Tensor


class Memory(nn.Module):
    """Never trained; `follow` once before each step, `push` once after."""

    image_QE: Tensor
    text_QE: Tensor
    same_Q2: Tensor
    seen: Tensor

    def __init__(self, model: PackedBlip, places: int, momentum: float = 0.995) -> None:
        super().__init__()
        self.momentum = momentum
        self.encoders = copy.deepcopy(model).requires_grad_(False)
        for holder in (self.encoders, *self.encoders.text.layers):
            for name in [name for name in UNREAD if hasattr(holder, name)]:
                delattr(holder, name)
        for name in ("image_QE", "text_QE"):
            self.register_buffer(name, torch.zeros(places, model.sizes.embed_dim))
        self.register_buffer("same_Q2", torch.full((places, 2), -1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # pairs that were ever pushed

    @torch.no_grad()
    def follow(self, model: PackedBlip) -> None:
        theirs = dict(model.named_parameters())
        own = dict(self.encoders.named_parameters())
        torch._foreach_lerp_(
            [local(p) for p in own.values()], [local(theirs[name]).detach() for name in own], 1 - self.momentum
        )

    @torch.no_grad()
    def features(self, images: PackedImages, texts: Stream) -> tuple[Tensor, Tensor]:
        """(B, E) of the images and of the texts, normalised."""
        found: tuple[Tensor, Tensor] = self.encoders(
            lambda it: (it.image_features(it.visual(images), images), it.text_features(texts))
        )
        if isinstance(self.encoders, FSDPModule):
            self.encoders.reshard()  # a backward would, and there is none
        return found

    def keys(self, image_GE: Tensor, text_GE: Tensor, same_G2: Tensor, valid_G: Tensor) -> Keys:
        """The step's features, before those of the ring."""
        held = torch.arange(len(self.same_Q2), device=self.seen.device) < self.seen
        return Keys(
            torch.cat([image_GE, self.image_QE]),
            torch.cat([text_GE, self.text_QE]),
            torch.cat([same_G2, self.same_Q2]),
            torch.cat([valid_G, held]),
        )

    @torch.no_grad()
    def push(self, keys: Keys) -> None:
        """Takes in the valid pairs of the step, over the oldest."""
        places = len(self.same_Q2)
        step = slice(0, len(keys.same_K2) - places)
        kept = keys.valid_K[step].nonzero()[:, 0]
        newest = kept[-places:]
        slots = (self.seen + torch.arange(len(kept), device=kept.device))[-places:] % places
        for ring, found in (
            (self.image_QE, keys.image_KE),
            (self.text_QE, keys.text_KE),
            (self.same_Q2, keys.same_K2),
        ):
            ring[slots] = found[newest]
        self.seen += len(kept)
