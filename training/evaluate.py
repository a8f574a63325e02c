"""Zero-shot classification and retrieval of an exported CLIP, with intervals, chance levels and counts.

The folder is read into the packed towers, so images are seen at their own aspect, as in training; for square images
a test holds these features against open_clip's own. Class embeddings are the mean of normalised prompt embeddings,
normalised again. An image that can't be read is a miss, and is counted. Intervals are Wilson's, 95 %.
"""

import math
from collections.abc import Sequence
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
        return Share(value=p, low=max(0.0, low), high=min(1.0, high), right=right, n=n)


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


def zero_shot(model_folder: Path, class_folder: Path, templates: Sequence[str]) -> ZeroShot:
    """Top-1 accuracy over the images of `class_folder`, one sub-folder per class, named for it.

    A template holds `{}` where the name goes. Raises PairmillError where there are no classes or templates.
    """
    classes = sorted(p for p in class_folder.glob("*") if p.is_dir()) if class_folder.is_dir() else []
    files = [
        (number, f) for number, c in enumerate(classes) for f in sorted(c.iterdir()) if f.suffix.lower() in SUFFIXES
    ]
    if len(classes) < 2 or not files or not templates:
        raise PairmillError(
            expected=f"two or more folders of images, one for each class, in {class_folder}, and a template",
            found=f"{len(classes)} folders, {len(files)} images, {len(templates)} templates",
            remedy="correct evaluate.zero_shot in the recipe",
        )
    model, _ = export.load(model_folder)
    prompts = [template.replace("{}", c.name) for c in classes for template in templates]
    means = embed_texts(model, prompts).unflatten(0, (len(classes), len(templates))).mean(1)
    images, ok = embed_images(model, [_bytes(f) for _, f in files])
    guesses = (images @ F.normalize(means, dim=-1).T).argmax(1)
    labels = torch.tensor([number for number, _ in files])
    right = (guesses == labels) & ok
    per_class = {
        c.name: Share.of(int(right[labels == number].sum()), int((labels == number).sum()))
        for number, c in enumerate(classes)
        if (labels == number).any()
    }
    accuracy = Share.of(int(right.sum()), len(files))
    return ZeroShot(accuracy=accuracy, per_class=per_class, chance=1 / len(classes), unreadable=int((~ok).sum()))


def _bytes(path: Path) -> bytes:
    """The file's bytes; none where it can't be read, so that its image counts as a miss."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def retrieval(model_folder: Path, images: Sequence[bytes], texts: Sequence[str]) -> Retrieval:
    """Recall at 1 and 5 among all pairs: image i and text i belong together, and equal texts are as right."""
    if len(images) != len(texts) or not images:
        raise PairmillError(
            expected="as many images as texts, at least one",
            found=f"{len(images)} images, {len(texts)} texts",
            remedy="retrieval is measured on held-out pairs: a larger trusted source has some",
        )
    model, _ = export.load(model_folder)
    image_NE, ok = embed_images(model, images)
    similar = image_NE @ embed_texts(model, texts).T
    similar[~ok] = -2.0  # below any cosine: an image that can't be read finds nothing and is found last
    numbers = torch.tensor([texts.index(text) for text in texts])
    right = (numbers[:, None] == numbers) & ok[:, None]
    recalls, chance = {}, {}
    for name, scores, hits in (("image_to_text", similar, right), ("text_to_image", similar.T, right.T)):
        for k in (1, 5):
            top = scores.topk(min(k, len(texts)), dim=1).indices
            recalls[f"{name}_at_{k}"] = Share.of(int(hits.gather(1, top).any(1).sum()), len(texts))
            chance[f"{name}_at_{k}"] = _chance(hits.sum(1).tolist(), len(texts), k)
    return Retrieval(recalls=recalls, chance=chance, unreadable=int((~ok).sum()))


@torch.inference_mode()
def embed_images(model: Towers, images: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """Normalised features (images, E), each at its own aspect within the model's number of patches; which were read."""
    patch_px, budget = model.visual.conv1.kernel_size[0], model.visual.grid**2
    features, ok = [], []
    for start in range(0, len(images), BATCH):
        grids, patches = [], []
        for data in images[start : start + BATCH]:
            found = decode(data)
            ok.append(found is not None)
            picture = np.zeros((1, 1, 3), np.uint8) if found is None else found
            grids.append(grid := grid_of(picture.shape[1], picture.shape[0], budget if ok[-1] else 1))
            patches.append(torch.from_numpy(patchify(resize(picture, grid, patch_px), grid, patch_px)))
        features.append(F.normalize(model.encode_image(pack_images(patches, grids, model.form)), dim=-1))
    return torch.cat(features), torch.tensor(ok)


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
