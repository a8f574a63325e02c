"""BLIP's three losses of a step over all ranks, each as a sum and a count of this rank.

ITC: contrast of images and texts with the momentum features of all ranks and the ring, towards targets that are partly
what the momentum encoders think (ALBEF's soft targets). ITM: does this text belong to this image; the wrong ones are
drawn by ITC's similarity from all ranks' pairs, never itself or one that shares row or text. LM: writing the text, with
label smoothing. Each image is encoded once. A pair of image and text is matched on the rank that holds the image: what
travels is the number of the chosen image, where the authors' gather takes the states of all patches. In return a rank
whose images many texts choose has more to do. Draws are hashes of (seed, step, uid) put through the
cumulative weights in an order that hangs on the pairs alone: any number of ranks draws the same.
BLIP: arXiv 2201.12086; ALBEF: arXiv 2107.07651.

Legend: B pairs of this rank, G of all ranks, K = G and the ring's places, E width of the common space.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pairs.identity import unit_hash
from training.blip_momentum import Keys, Memory
from training.models.blip import PackedBlip, Span, Stream, stream
from training.objectives import gather
from training.packing import PackedImages

FLOOR = 1e-4  # added to every other pair's chance of being drawn, as the authors do
Part = tuple[Tensor, Tensor]  # sum and count


class Entry(NamedTuple):
    """A pair of a step: `text` is the number of its text, equal texts having one, `ids` its tokens on the host."""

    row: int
    uid: str
    text: int
    ids: Tensor


@dataclass(frozen=True)
class Aims:
    """What is trained, and how texts are marked. `prompt` stands before each written text, and is not learned."""

    losses: frozenset[str] = frozenset({"itc", "itm", "lm"})
    match: int | None = None  # the token that begins a text which looks at an image; None: that of texts alone
    write: int = 0  # the token that begins a written text
    prompt: tuple[int, ...] = ()
    unknown: int | None = None  # a token that is never learned to be written
    smoothing: float = 0.1
    context: int = 512  # tokens that a written text may have


@dataclass(frozen=True)
class Pairs:
    """A step's pairs over all ranks in their own order, that of rows, and which of them are this rank's."""

    texts: Sequence[Tensor]  # G, on the host
    same_G2: Tensor  # row and text of each
    order_G: Tensor  # where each is among all ranks' pairs, rank after rank
    place_B: Tensor  # which of them each own pair is
    places: Sequence[int]  # the same on the host
    spans: Sequence[Span]  # of own images
    valid_B: Tensor
    draws_B2: Tensor  # float64 in [0, 1): for the wrong text of each image, and the wrong image of each text
    counts: Sequence[int]
    rank: int

    def to(self, device: torch.device) -> "Pairs":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return replace(self, **moved)

    @functools.cached_property
    def alone(self) -> Stream:
        """Own texts, without an image."""
        return stream([self.texts[p] for p in self.places], self.valid_B.device)

    def gather(self, x_BE: Tensor) -> Tensor:
        """(G, E) of all ranks' rows, in the pairs' order; no gradients."""
        with torch.no_grad():
            return gather(x_BE, self.counts, self.rank)[self.order_G]


_TENSORS = ("same_G2", "order_G", "place_B", "valid_B", "draws_B2")


def pairs_of(
    split: Sequence[Sequence[Entry]], rank: int, spans: Sequence[Span], valid: Tensor, seed: int, step: int
) -> Pairs:
    """`split` are all ranks' pairs; `spans` and `valid` tell of this rank's images."""
    flat = [entry for part in split for entry in part]
    order = sorted(range(len(flat)), key=lambda i: (flat[i].row, flat[i].text))
    counts = [len(part) for part in split]
    place = torch.argsort(torch.tensor(order))[sum(counts[:rank]) : sum(counts[: rank + 1])]
    draws = [[unit_hash(seed, step, e.uid, what) for what in ("text", "image")] for e in split[rank]]
    return Pairs(
        [flat[i].ids for i in order], torch.tensor([[flat[i].row, flat[i].text] for i in order]), torch.tensor(order),
        place, place.tolist(), spans, valid, torch.tensor(draws, dtype=torch.float64), counts, rank,
    )  # fmt: skip


def keys_of(memory: Memory, images: PackedImages, pairs: Pairs) -> Keys:
    """What this step is compared with."""
    image_BE, text_BE = memory.features(images, pairs.alone)
    found = pairs.gather(torch.cat([image_BE, text_BE, pairs.valid_B[:, None].to(image_BE)], 1))
    image_GE, text_GE = found[:, :-1].chunk(2, 1)
    return memory.keys(image_GE, text_GE, pairs.same_G2, found[:, -1] > 0.5)


def losses(
    model: PackedBlip, images: PackedImages, pairs: Pairs, keys: Keys | None, aims: Aims, alpha: float
) -> dict[str, Part]:
    """The sum and count of each of `aims.losses`; ITC and ITM need `keys`, and ITM needs ITC's similarities."""
    device, parts = pairs.valid_B.device, dict[str, Part]()
    states = model.visual(images)
    matched, written, labels, weights = None, None, None, None
    if keys is not None:
        image_BE, text_BE = model.image_features(states, images), model.text_features(pairs.alone)
        with torch.autocast(device.type, enabled=False):
            total, similar = contrast(image_BE, text_BE, keys, pairs, model.logit_scale.exp(), alpha)
        parts["itc"] = total, pairs.valid_B.sum()
        matched, labels, weights = _to_match(similar, keys, pairs, aims, device)
    if "lm" in aims.losses:
        written, rows, targets, counted = _to_write(pairs, aims, device)
    streams = [s for s in (matched, written) if s is not None]
    found = model.text(streams, states) if streams else []
    if matched is not None and labels is not None and weights is not None:
        each = F.cross_entropy(_wide(model.matches(found[0], matched)), labels, reduction="none")
        parts["itm"] = (each * weights).sum(), weights.sum()
    if written is not None:
        logits = _wide(model.words(found[-1][rows]))
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=aims.smoothing)
        parts["lm"] = (each * counted).sum(), counted.sum()
    return parts


def total(parts: dict[str, Part], valid_B: Tensor, ranks: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The losses' sum over all ranks, each divided by its own global count, as a sum and a count of this rank's pairs;
    and each loss over all ranks."""
    pairs = valid_B.sum()
    sums = torch.stack(
        [torch.stack([value.detach().double(), count.double()]) for value, count in (*parts.values(), (pairs, pairs))]
    )
    if ranks > 1:
        dist.all_reduce(sums)
    counts = sums[:, 1].clamp(min=1)
    whole = torch.stack([value for value, _ in parts.values()])
    told = zip(parts, sums[:-1, 0] / counts[:-1], strict=True)
    return (whole * (counts[-1] / counts[:-1]).to(whole)).sum(), pairs, dict(told)


def ramped(alpha: float, step: int, ramp_steps: int) -> float:
    """The soft targets' share at a step: from 0 up to `alpha`."""
    return alpha * min(1.0, step / max(1, ramp_steps))


def contrast(
    image_BE: Tensor, text_BE: Tensor, keys: Keys, pairs: Pairs, scale: Tensor, alpha: float
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """ITC's sum, and the logits (B, G) of each image with the step's texts and of each text with its images. What
    shares row or text with a pair is not compared with it, as it is neither another nor itself."""
    place_B, count = pairs.place_B, len(pairs.texts)
    rows = torch.arange(len(place_B), device=place_B.device)
    others = _alike(keys.same_K2[place_B], keys.same_K2) | ~keys.valid_K
    others[rows, place_B] = False
    sum_, similar = image_BE.new_zeros(()), []
    for query, slow, far in (
        (image_BE, keys.image_KE[place_B], keys.text_KE),
        (text_BE, keys.text_KE[place_B], keys.image_KE),
    ):
        logits = (scale * query @ far.T).masked_fill(others, -torch.inf)
        with torch.no_grad():
            target = alpha * (scale * slow @ far.T).masked_fill(others, -torch.inf).softmax(1)
            target[rows, place_B] += 1 - alpha
        each = -(logits.log_softmax(1).masked_fill(others, 0) * target).sum(1)
        sum_ = sum_ + (each * pairs.valid_B).sum() / 2
        similar.append(logits[:, :count].detach())
    return sum_, (similar[0], similar[1])


def draw(similar_BG: Tensor, excluded_BG: Tensor, draws_B: Tensor) -> Tensor:
    """(B,) one of the G for each, by the softmax of the similarities; -1 where all are excluded."""
    weights = (similar_BG.double().softmax(1) + FLOOR).masked_fill(excluded_BG, 0)
    ends = weights.cumsum(1)
    whole = ends[:, -1]
    # Weights [0, 2, 0, 3] end at [0, 2, 2, 5]: a draw of 2.1 of 5 falls to the last.
    at = torch.searchsorted(ends, (draws_B * whole * (1 - 1e-12))[:, None], right=True)[:, 0]
    return torch.where(whole > 0, at, -1)


def _to_match(
    similar: tuple[Tensor, Tensor], keys: Keys, pairs: Pairs, aims: Aims, device: torch.device
) -> tuple[Stream, Tensor, Tensor]:
    """Own images with their texts and with wrong ones, and with all texts that chose them; labels and weights."""
    count = len(pairs.texts)
    excluded = _alike(keys.same_K2[pairs.place_B], pairs.same_G2) | ~(keys.valid_K[:count] & pairs.valid_B[:, None])
    text_B, image_B = (draw(s, excluded, pairs.draws_B2[:, i]) for i, s in enumerate(similar))
    image_G = pairs.gather(image_B[:, None].double())[:, 0].long()
    # The one wait for the device before the backward: what attention is told of lengths lies on the host.
    found = torch.cat([text_B, image_G, pairs.valid_B.long()]).cpu()
    texts, images, valid = (x.tolist() for x in found.split([len(text_B), count, len(text_B)]))
    own = {place: i for i, place in enumerate(pairs.places)}
    chosen = [(i, place, 1, float(fine)) for (place, i), fine in zip(own.items(), valid, strict=True)]
    chosen += [(i, text, 0, 1.0) for i, text in enumerate(texts) if text >= 0]
    chosen += [(own[image], text, 0, 1.0) for text, image in enumerate(images) if image in own]
    looks, read, labels, weights = zip(*chosen, strict=True)
    marked = [_begun(pairs.texts[t], aims.match) for t in read]
    look = stream(marked, device, [pairs.spans[i] for i in looks])
    moved = [torch.tensor(x).to(device, non_blocking=True) for x in (labels, weights)]
    return look, moved[0], moved[1]


def _to_write(pairs: Pairs, aims: Aims, device: torch.device) -> tuple[Stream, Tensor, Tensor, Tensor]:
    """Own texts as they are written; the rows that say a learned token, these tokens, and which of them count."""
    head, skip = torch.tensor([aims.write, *aims.prompt]), len(aims.prompt)
    assert aims.context > skip + 1, "a prompt leaves room for a word"
    whole = [_cut(torch.cat([head, pairs.texts[p][1:]]), aims.context) for p in pairs.places]
    written = stream([ids[:-1] for ids in whole], device, pairs.spans, causal=True)
    counts = torch.tensor([len(ids) - 1 - skip for ids in whole])
    offsets = torch.cat([torch.arange(skip, len(ids) - 1) for ids in whole]).to(device, non_blocking=True)
    targets = torch.cat([ids[1 + skip :] for ids in whole]).to(device, non_blocking=True)
    each = counts.to(device, non_blocking=True)
    rows = written.first.repeat_interleave(each, output_size=len(targets)) + offsets
    counted = pairs.valid_B.repeat_interleave(each, output_size=len(targets))
    if aims.unknown is not None:
        counted = counted & (targets != aims.unknown)
    return written, rows, targets, counted


def _alike(a_B2: Tensor, b_K2: Tensor) -> Tensor:
    return (a_B2[:, None] == b_K2).any(-1)


def _begun(ids: Tensor, mark: int | None) -> Tensor:
    return ids if mark is None else torch.cat([ids.new_tensor([mark]), ids[1:]])


def _cut(ids: Tensor, context: int) -> Tensor:
    return ids if len(ids) <= context else torch.cat([ids[: context - 1], ids[-1:]])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
