"""Packed batches: images as patches at their own aspect and texts as tokens, one stream each, no padding.

Segments are sorted by length inside a stream, so that equal lengths are neighbours (see `attention`); `pool`
finds each example's pooled token again, in the examples' own order. Fill = useful / computed tokens. Cost: index
arithmetic on the host. NaViT: arXiv 2307.06304.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.attention import Layout

Grid = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True)
class PackedImages:
    """`patches` (T, 3·P·P) with a zero row where a class token goes; `place` says what each row is."""

    patches: Tensor  # uint8 pixels in [0, 255], or float already normalised; channel, row, column order
    grids: tuple[Grid, ...]  # the different grids of the batch
    place: Tensor  # int64 (T,): 0 for a class token, else 1 + position among the cells of `grids`
    pool: Tensor  # int64 (examples,): the row of each example's class token
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


def pack_images(patches: Sequence[Tensor], grids: Sequence[Grid]) -> PackedImages:
    """Packs images given as (h·w, 3·P·P) patches in row-major order of their (h, w) `grids`."""
    assert len(patches) == len(grids) and all(len(p) == h * w for p, (h, w) in zip(patches, grids, strict=True))
    order = sorted(range(len(grids)), key=lambda i: (grids[i][0] * grids[i][1], grids[i]))
    kinds = tuple(sorted(set(grids)))
    first, cells = {}, 1
    for kind in kinds:
        first[kind] = cells
        cells += kind[0] * kind[1]
    lengths = [1 + grids[i][0] * grids[i][1] for i in order]
    rows = patches[0].new_zeros(sum(lengths), patches[0].shape[1])
    place = torch.zeros(len(rows), dtype=torch.int64)
    pool = torch.zeros(len(grids), dtype=torch.int64)
    start = 0
    for i, length in zip(order, lengths, strict=True):
        rows[start + 1 : start + length] = patches[i]
        place[start + 1 : start + length] = torch.arange(first[grids[i]], first[grids[i]] + length - 1)
        pool[i] = start
        start += length
    return PackedImages(rows, kinds, place, pool, Layout.of(lengths), start)


def pack_texts(texts: Sequence[Tensor]) -> PackedTexts:
    """Packs texts given as (length,) token ids, pooled at the last token (EOT)."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    lengths = [len(texts[i]) for i in order]
    tokens = torch.cat([texts[i] for i in order]).long()
    positions = torch.cat([torch.arange(n) for n in lengths])
    pool = torch.zeros(len(texts), dtype=torch.int64)
    pool[torch.tensor(order)] = torch.tensor(lengths).cumsum(0) - 1
    return PackedTexts(tokens, positions, pool, Layout.of(lengths, causal=True), sum(lengths))
