"""Packed batches: images as patches at their own aspect and texts as tokens, one stream each, no padding.

Segments are sorted by length inside a stream, so that equal lengths are neighbours (see `attention`); `pool`
finds each example's pooled token again, in the examples' own order. Where shapes shall repeat, so that a compiler sees
one, a stream is filled up by a tail: a segment of its own that nothing looks at. Fill is useful over computed tokens,
tails included. Cost: index arithmetic on the host. NaViT: arXiv 2307.06304.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.attention import Layout

Grid = tuple[int, int]  # rows and columns of patches
Cells = npt.NDArray[np.int64]
Move = Callable[[Tensor], Tensor]


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
    host_pool: Tensor  # `pool`, wherever the rest lies

    def moved(self, move: Move) -> "PackedImages":
        patches, place, pool = (move(x) for x in (self.patches, self.place, self.pool))
        return PackedImages(patches, self.grids, place, pool, self.layout.moved(move), self.useful, self.host_pool)

    def to(self, device: torch.device) -> "PackedImages":
        return self.moved(lambda x: x.to(device, non_blocking=True))


@dataclass(frozen=True)
class PackedTexts:
    """`tokens` and their `positions` (T,), from 0 in each text; `pool` (examples,) rows of the last tokens."""

    tokens: Tensor
    positions: Tensor
    pool: Tensor
    layout: Layout
    useful: int

    def moved(self, move: Move) -> "PackedTexts":
        tokens, positions, pool = (move(x) for x in (self.tokens, self.positions, self.pool))
        return PackedTexts(tokens, positions, pool, self.layout.moved(move), self.useful)

    def to(self, device: torch.device) -> "PackedTexts":
        return self.moved(lambda x: x.to(device, non_blocking=True))


@dataclass(frozen=True)
class Frame:
    """A stream of images without its pixels: their order by length, and the row of each image's first patch."""

    order: list[int]
    starts: list[int]
    grids: tuple[Grid, ...]
    place: Tensor
    pool: Tensor
    layout: Layout
    useful: int

    def holding(self, patches: Tensor) -> PackedImages:
        """With `patches` (T, 3·P·P)."""
        assert len(patches) == len(self.place)
        return PackedImages(patches, self.grids, self.place, self.pool, self.layout, self.useful, self.pool)


def frame_images(
    grids: Sequence[Grid], cells: Sequence[Cells], form: Form = CLIP, multiple: int = 1, least: int = 0
) -> Frame:
    """Where images go of which `cells` (row-major in their (h, w) `grids`) are looked at. For `multiple` see `tail`."""
    order = sorted(range(len(grids)), key=lambda i: (len(cells[i]), grids[i]))
    kinds = tuple(sorted(set(grids)))
    first, numbered = {}, 1
    for kind in kinds:
        first[kind] = numbered
        numbered += kind[0] * kind[1]
    extra = int(form.class_token)
    lengths = [extra + len(cells[i]) for i in order]
    useful, rest = sum(lengths), tail(sum(lengths), multiple, least)
    place = np.zeros(useful + sum(rest), np.int64)
    starts, pool, start = [0] * len(grids), [0] * len(grids), 0
    for segment, (i, length) in enumerate(zip(order, lengths, strict=True)):
        starts[i] = start + extra
        place[start + extra : start + length] = first[grids[i]] + cells[i]
        pool[i] = start if form.class_token else segment
        start += length
    layout = Layout.of([*lengths, *rest])
    return Frame(order, starts, kinds, torch.from_numpy(place), torch.tensor(pool), layout, useful)


def pack_images(
    patches: Sequence[Tensor],
    grids: Sequence[Grid],
    form: Form = CLIP,
    cells: Sequence[Tensor] | None = None,
    multiple: int = 1,
) -> PackedImages:
    """Packs images given as patches (their number, 3·P·P) in row-major order of their (h, w) `grids`; where `cells` are
    given (patch dropout), they name the cells of each image that are there."""
    held = [c.numpy() for c in cells] if cells else [np.arange(h * w) for h, w in grids]
    assert all(len(p) == len(c) for p, c in zip(patches, held, strict=True))
    frame = frame_images(grids, held, form, multiple)
    rows = patches[0].new_zeros(len(frame.place), patches[0].shape[1])
    for start, own in zip(frame.starts, patches, strict=True):
        rows[start : start + len(own)] = own
    return frame.holding(rows)


def pack_texts(texts: Sequence[Tensor], form: Form = CLIP, multiple: int = 1, least: int = 0) -> PackedTexts:
    """Packs texts given as (length,) token ids, pooled at the last token (EOT)."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    lengths = [len(texts[i]) for i in order]
    rest = tail(sum(lengths), multiple, least)
    tokens = torch.cat([*(texts[i] for i in order), texts[0].new_zeros(sum(rest))]).long()
    positions = torch.cat([*map(torch.arange, lengths), torch.zeros(sum(rest), dtype=torch.int64)])
    pool = torch.zeros(len(texts), dtype=torch.int64)
    pool[torch.tensor(order)] = torch.tensor(lengths).cumsum(0) - 1
    return PackedTexts(tokens, positions, pool, Layout.of([*lengths, *rest], causal=form.causal), sum(lengths))


def tail(tokens: int, multiple: int, least: int = 0) -> list[int]:
    """The length of the segment that fills a stream up to a multiple of tokens, above `least`; there always is one
    where shapes shall repeat (`multiple` above 1), for the number of segments is a shape too."""
    return [max(least, tokens // multiple * multiple + multiple) - tokens] if multiple > 1 else []
