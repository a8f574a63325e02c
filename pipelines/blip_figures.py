"""What a BLIP in transformers' format says of held-out pairs: zero-shot by its contrast, retrieval by contrast and
re-ranked by its match head, captions. The passes are those of the filters `blip_match` and `blip_caption`.

Retrieval is BLIP's own (arXiv 2201.12086, and its code): the best by contrast are ordered by the match logit added to
the cosine, others stay behind. Each image is encoded once by each model; its patches wait in a file,
so that memory holds a batch of them and the cosines of all images with all texts.
"""

import contextlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from filters import blip
from filters.base import Batch
from filters.blip_caption import BlipCaption
from filters.blip_match import BlipMatch, image_features, match_logits, same_length, text_features
from filters.images import decode
from training.evaluate import Classes, Retrieval, ZeroShot, recalls

BATCH = 256
NOWHERE = -1e3  # of what isn't re-ranked; below any logit and cosine


@dataclass(frozen=True)
class Matcher:
    """A match filter and its model: features and logits of images and texts."""

    one: BlipMatch
    model: Any
    processor: Any

    @staticmethod
    def load(one: BlipMatch) -> "Matcher":
        return Matcher(one, *blip.load(one.weights, blip.MATCHES, one.precision))

    def images(self, images: Iterable[bytes], keep: Path | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features (N, E), which were read, and the patches (N, P, D) as they lie in the file `keep`."""
        features, ok, black = [], [], np.zeros((1, 1, 3), np.uint8)
        image = torch.empty(0)
        with keep.open("wb") if keep else contextlib.nullcontext() as file:
            for some in _pixels(images):
                ok += [pixels is not None for pixels in some]
                looks = [black if pixels is None else pixels for pixels in some]
                for image in blip.encoded(self.model, self.processor, looks):
                    features.append(image_features(self.model, image[None])[0].cpu())
                    if file:
                        file.write(image.cpu().view(torch.uint8).numpy().tobytes())
        read = torch.tensor(ok)
        if keep is None:
            return torch.stack(features), read, None
        size = len(ok) * image.numel()
        patches = torch.from_file(str(keep), shared=True, size=size, dtype=image.dtype)
        return torch.stack(features), read, patches.view(len(ok), *image.shape)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features (N, E)."""
        ids = self.one.tokens(self.processor, texts)[0]
        features = torch.empty(len(ids), self.model.config.image_text_hidden_size)
        for group in same_length(ids):
            tokens = torch.tensor([ids[i] for i in group], device=self.model.device)
            features[group] = text_features(self.model, tokens).cpu()
        return features

    def logits(self, patches: Tensor, texts: Sequence[str], asked: Tensor) -> Tensor:
        """The match logit of each image (a row) with each text that is `asked` (N, N), `NOWHERE` for the others."""
        ids = self.one.tokens(self.processor, texts)[0]
        images, columns = (each.tolist() for each in asked.nonzero(as_tuple=True))
        found = torch.full(asked.shape, NOWHERE)
        for group in same_length([ids[j] for j in columns]):
            rows, mine = ([each[k] for k in group] for each in (images, columns))
            tokens = torch.tensor([ids[j] for j in mine], device=self.model.device)
            found[rows, mine] = match_logits(self.model, patches[rows].to(self.model.device), tokens)[:, 1].cpu()
        return found


def _pixels(images: Iterable[bytes]) -> Iterator[list[np.ndarray | None]]:
    left = iter(images)
    while some := list(itertools.islice(left, BATCH)):
        yield [decode(data) if data else None for data in some]


@torch.inference_mode()
def zero_shot(one: BlipMatch, classes: Classes) -> ZeroShot:
    matcher = Matcher.load(one)
    images, ok, _ = matcher.images(classes.images())
    return classes.judge(images, ok, matcher.texts(classes.prompts))


@torch.inference_mode()
def retrieval(
    one: BlipMatch, images: Iterable[bytes], texts: Sequence[str], scratch: Path, reranked: int
) -> tuple[Retrieval, ...]:
    """By contrast alone, and with the `reranked` best ordered anew. Patches lie below `scratch` meanwhile."""
    matcher, k = Matcher.load(one), min(reranked, len(texts))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        features, ok, patches = matcher.images(images, Path(folder, "patches"))
        cosine = features @ matcher.texts(texts).T
        best = cosine.masked_fill(~ok[:, None], -torch.inf)
        to_text, to_image = (
            torch.zeros_like(c, dtype=bool).scatter_(1, c.topk(k).indices, True) for c in (best, best.T)
        )
        assert patches is not None
        logits = matcher.logits(patches, texts, (to_text | to_image.T) & ok[:, None])
    ranked = cosine + logits
    to_text, to_image = (s.masked_fill(~m, NOWHERE) for s, m in ((ranked, to_text), (ranked.T, to_image)))
    return recalls(cosine, cosine.T, texts, ok), recalls(to_text, to_image, texts, ok)


def captions(one: BlipCaption, uids: Sequence[str], images: Iterable[bytes]) -> list[str | None]:
    """The first caption of each image; None where there is none."""
    found: list[str | None] = []
    for some in _pixels(images):
        told = one.score(Batch(list(uids[len(found) : len(found) + len(some)]), {}, some))
        found += [texts[0] if texts else None for texts in told["texts"]]
    return found
