"""Packed batches: images as patches at their own aspect and texts as tokens, one stream each, no padding.

Segments are sorted by length inside a stream, so that equal lengths are neighbours (see `attention`); `pool`
finds each example's pooled token again, in the examples' own order. Where shapes shall repeat, so that a compiler sees
few, a stream is filled up to a multiple of tokens by a tail: a segment of its own that nothing looks at. Fill is useful
over computed tokens, tails included. Cost: index arithmetic on the host. NaViT: arXiv 2307.06304.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.attention import Layout

Grid = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class Form:
    """How a model wants its examples: a class token before an image's patches, tokens that see only earlier ones."""

    class_token: bool = True
    causal: bool = True


CLIP, SIGLIP = Form(), Form(class_token=False, causal=False)


@dataclass(frozen=True)
class PackedImages:
    """`patches` (T, 3·P·P) with a zero row where a class token goes; `place` says what each row is. `pool` points to
    the example's class token, or to its segment where the form has none."""

    patches: Tensor  # uint8 pixels in [0, 255], or float already normalised; channel, row, column order
    grids: tuple[Grid, ...]  # the different grids of the batch
    place: Tensor  # int64 (T,): 0 for a class token, else 1 + position among the cells of `grids`
    pool: Tensor  # int64 (examples,)
    layout: Layout
    useful: int  # tokens that belong to examples

    def to(self, device: torch.device) -> "PackedImages":
        patches, place, pool = (x.to(device, non_blocking=True) for x in (self.patches, self.place, self.pool))
        return PackedImages(patches, self.grids, place, pool, self.layout.to(device), self.useful)


@dataclass(frozen=True)
class PackedTexts:
    """`tokens` and their `positions` (T,), from 0 in each text; `pool` (examples,) rows of the last tokens."""

    tokens: Tensor
    positions: Tensor
    pool: Tensor
    layout: Layout
    useful: int

    def to(self, device: torch.device) -> "PackedTexts":
        tokens, positions, pool = (x.to(device, non_blocking=True) for x in (self.tokens, self.positions, self.pool))
        return PackedTexts(tokens, positions, pool, self.layout.to(device), self.useful)


def pack_images(
    patches: Sequence[Tensor],
    grids: Sequence[Grid],
    form: Form = CLIP,
    cells: Sequence[Tensor] | None = None,
    multiple: int = 1,
) -> PackedImages:
    """Packs images given as patches (their number, 3·P·P) in row-major order of their (h, w) `grids`; where `cells` are
    given (patch dropout), they name the cells of each image that are there."""
    held = cells or [torch.arange(h * w) for h, w in grids]
    assert len(patches) == len(grids) and all(len(p) == len(c) for p, c in zip(patches, held, strict=True))
    order = sorted(range(len(grids)), key=lambda i: (len(held[i]), grids[i]))
    kinds = tuple(sorted(set(grids)))
    first, numbered = {}, 1
    for kind in kinds:
        first[kind] = numbered
        numbered += kind[0] * kind[1]
    extra = int(form.class_token)
    lengths = [extra + len(held[i]) for i in order]
    tail = _tail(sum(lengths), multiple)
    rows = patches[0].new_zeros(sum(lengths) + sum(tail), patches[0].shape[1])
    place = torch.zeros(len(rows), dtype=torch.int64)
    pool = torch.zeros(len(grids), dtype=torch.int64)
    start = 0
    for segment, (i, length) in enumerate(zip(order, lengths, strict=True)):
        rows[start + extra : start + length] = patches[i]
        place[start + extra : start + length] = first[grids[i]] + held[i]
        pool[i] = start if form.class_token else segment
        start += length
    return PackedImages(rows, kinds, place, pool, Layout.of([*lengths, *tail]), start)


def pack_texts(texts: Sequence[Tensor], form: Form = CLIP, multiple: int = 1) -> PackedTexts:
    """Packs texts given as (length,) token ids, pooled at the last token (EOT)."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    lengths = [len(texts[i]) for i in order]
    tail = _tail(sum(lengths), multiple)
    tokens = torch.cat([*(texts[i] for i in order), texts[0].new_zeros(sum(tail))]).long()
    positions = torch.cat([*map(torch.arange, lengths), torch.zeros(sum(tail), dtype=torch.int64)])
    pool = torch.zeros(len(texts), dtype=torch.int64)
    pool[torch.tensor(order)] = torch.tensor(lengths).cumsum(0) - 1
    return PackedTexts(tokens, positions, pool, Layout.of([*lengths, *tail], causal=form.causal), sum(lengths))


def _tail(tokens: int, multiple: int) -> list[int]:
    """The length of the segment that fills a stream up, if there is any."""
    return [-tokens % multiple] if tokens % multiple else []
