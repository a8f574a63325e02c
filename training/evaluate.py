"""Zero-shot classification and retrieval, with intervals, chance levels and counts: from features (`Classes.judge`)
and scores (`recalls`) of any model, and of an exported CLIP.

The folder is read into the packed towers, so images are seen at their own aspect, as in training; for square images
a test holds these features against open_clip's own. Class embeddings are the mean of normalised prompt embeddings,
normalised again. An image that can't be read is a miss, and is counted. Intervals are Wilson's, 95 %.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from pairs.errors import PairmillError
from training import export
from training.models.clip import Towers
from training.packing import pack_images, pack_texts
from training.pixels import decode, patchify, resize
from training.plan import grid_of
from training.tokens import encode

BATCH = 256
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Z = 1.959964  # of a 95 % interval


class Share(BaseModel):
    """`right` of `n`, in [0, 1], with its interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    value: float
    low: float
    high: float
    right: int
    n: int

    @staticmethod
    def of(right: int, n: int) -> "Share":
        """Wilson's interval: for 8 of 10 it is 0.49 to 0.94."""
        p, z2 = right / n, Z * Z
        middle, spread = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low, high = (middle - spread) / (1 + z2 / n), (middle + spread) / (1 + z2 / n)
        low, high = min(p, max(0.0, low)), max(p, min(1.0, high))  # at 0 and 1 equal to p, but for rounding
        return Share(value=p, low=low, high=high, right=right, n=n)


class ZeroShot(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    accuracy: Share
    per_class: dict[str, Share]
    chance: float
    unreadable: int


class Retrieval(BaseModel):
    """Recalls by name: `image_to_text_at_1`, `image_to_text_at_5`, `text_to_image_at_1`, `text_to_image_at_5`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    recalls: dict[str, Share]
    chance: dict[str, float]
    unreadable: int


@dataclass(frozen=True)
class Classes:
    """What a zero-shot figure asks: images with the number of their class, and for each class its prompts in turn."""

    names: list[str]
    files: list[Path]
    labels: list[int]
    prompts: list[str]

    @staticmethod
    def read(folder: Path, templates: Sequence[str]) -> "Classes":
        """One sub-folder per class, named for it; a template holds `{}` where the name goes. Raises PairmillError where
        there are no classes or templates."""
        classes = sorted(p for p in folder.glob("*") if p.is_dir()) if folder.is_dir() else []
        files = [(i, f) for i, c in enumerate(classes) for f in sorted(c.iterdir()) if f.suffix.lower() in SUFFIXES]
        if len(classes) < 2 or not files or not templates:
            raise PairmillError(
                expected=f"two or more folders of images, one for each class, in {folder}, and a template",
                found=f"{len(classes)} folders, {len(files)} images, {len(templates)} templates",
                remedy="correct evaluate.zero_shot in the recipe",
            )
        prompts = [template.replace("{}", c.name) for c in classes for template in templates]
        return Classes([c.name for c in classes], [f for _, f in files], [i for i, _ in files], prompts)

    def images(self) -> Iterator[bytes]:
        """Their bytes; none where a file can't be read, so that its image counts as a miss."""
        for path in self.files:
            try:
                yield path.read_bytes()
            except OSError:
                yield b""

    def judge(self, images_NE: Tensor, ok: Tensor, prompts_PE: Tensor) -> ZeroShot:
        """Top-1 accuracy of normalised features: of the images, `ok` where one was read, and of the prompts."""
        means = prompts_PE.unflatten(0, (len(self.names), -1)).mean(1)
        guesses, labels = (images_NE @ F.normalize(means, dim=-1).T).argmax(1), torch.tensor(self.labels)
        right = (guesses == labels) & ok
        mine = {name: labels == number for number, name in enumerate(self.names) if number in self.labels}
        per_class = {name: Share.of(int(right[rows].sum()), int(rows.sum())) for name, rows in mine.items()}
        accuracy = Share.of(int(right.sum()), len(labels))
        told = {"per_class": per_class, "chance": 1 / len(self.names), "unreadable": int((~ok).sum())}
        return ZeroShot(accuracy=accuracy, **told)


def zero_shot(model_folder: Path, class_folder: Path, templates: Sequence[str]) -> ZeroShot:
    """Top-1 accuracy over the images of `class_folder` (`Classes.read`)."""
    classes = Classes.read(class_folder, templates)
    model, _ = export.load(model_folder)
    images, ok = embed_images(model, classes.images())
    return classes.judge(images, ok, embed_texts(model, classes.prompts))


def retrieval(model_folder: Path, images: Iterable[bytes], texts: Sequence[str]) -> Retrieval:
    """Recall at 1 and 5 among all pairs: image i and text i belong together, and equal texts are as right."""
    model, _ = export.load(model_folder)
    images_NE, ok = embed_images(model, images)
    if len(images_NE) != len(texts):
        raise PairmillError(
            expected="as many images as texts, at least one",
            found=f"{len(images_NE)} images, {len(texts)} texts",
            remedy="retrieval is measured on held-out pairs: a larger trusted source has some",
        )
    similar = images_NE @ embed_texts(model, texts).T
    return recalls(similar, similar.T, texts, ok)


def recalls(to_text_NN: Tensor, to_image_NN: Tensor, texts: Sequence[str], ok: Tensor) -> Retrieval:
    """Recalls by what each image (a row of `to_text`) and each text (a row of `to_image`) scores the others with. An
    image that isn't `ok` finds nothing and is found last."""
    first: dict[str, int] = {}
    numbers = torch.tensor([first.setdefault(text, len(first)) for text in texts])
    right = (numbers[:, None] == numbers) & ok[:, None]
    unread = ~ok[:, None]
    found, chance = {}, {}
    for name, scores, hits in (
        ("image_to_text", to_text_NN.masked_fill(unread, -torch.inf), right),
        ("text_to_image", to_image_NN.masked_fill(unread.T, -torch.inf), right.T),
    ):
        for k in (1, 5):
            top = scores.topk(min(k, len(texts)), dim=1).indices
            found[f"{name}_at_{k}"] = Share.of(int(hits.gather(1, top).any(1).sum()), len(texts))
            chance[f"{name}_at_{k}"] = _chance(hits.sum(1).tolist(), len(texts), k)
    return Retrieval(recalls=found, chance=chance, unreadable=int((~ok).sum()))


@torch.inference_mode()
def embed_images(model: Towers, images: Iterable[bytes]) -> tuple[Tensor, Tensor]:
    """Normalised features (images, E), each at its own aspect within the model's number of patches; which were read."""
    patch_px, budget = model.visual.conv1.kernel_size[0], model.visual.grid**2
    features, ok, left = [], [], iter(images)
    while some := list(itertools.islice(left, BATCH)):
        grids, patches = [], []
        for data in some:
            found = decode(data)
            ok.append(found is not None)
            picture = np.zeros((1, 1, 3), np.uint8) if found is None else found
            grids.append(grid := grid_of(picture.shape[1], picture.shape[0], budget if ok[-1] else 1))
            patches.append(torch.from_numpy(patchify(resize(picture, grid, patch_px), grid, patch_px)))
        features.append(F.normalize(model.encode_image(pack_images(patches, grids, model.form)), dim=-1))
    return torch.cat(features) if features else torch.empty(0, 0), torch.tensor(ok, dtype=torch.bool)


@torch.inference_mode()
def embed_texts(model: Towers, texts: Sequence[str]) -> Tensor:
    """Normalised features (texts, E)."""
    context = len(model.positional_embedding)
    ids = [torch.from_numpy(encode(text, context, model.tokenizer)[0]) for text in texts]
    parts = [pack_texts(ids[start : start + BATCH], model.form) for start in range(0, len(ids), BATCH)]
    return torch.cat([F.normalize(model.encode_text(part), dim=-1) for part in parts])


def _chance(hits: list[int], n: int, k: int) -> float:
    """Mean chance that k random candidates of n hold one of a query's right ones."""
    misses = (math.comb(n - h, min(k, n)) / math.comb(n, min(k, n)) for h in hits)
    return 1 - sum(misses) / len(hits)
