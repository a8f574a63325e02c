"""How well image and texts agree, by any CLIP that open_clip loads: a published tag, a local folder, a trained model.

One forward pass gives the cosines of every text and both embeddings, which later filters and reducers read instead
of running the model again. Images are prepared as the model's own configuration says, by torch's antialiased resize on
uint8 instead of PIL's (within one grey level of it). Cost is the model's forward pass; preparing takes about 0.5 ms
an image. CLIP: arXiv 2103.00020; filtering by its cosine: LAION-400M, arXiv 2111.02114.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

from filters.base import Batch, Filter, Values
from filters.weights import check_clip, clip_hashes


@dataclass(frozen=True)
class Clip(Filter):
    """`cosine` of the first text and `cosines` of all texts, in [-1, 1], as fp32 embeddings give them; `image` and
    `text` (the first) the normalised embeddings in fp16. Blank texts and images that don't decode have none, nor has
    what the model makes no numbers of.

    `weights` is one of the model's tags, a folder in open_clip's format (which then names the model), or null
    for random weights, which serve benchmarks alone.
    """

    model: str = "ViT-B-32"
    weights: str | None = "laion2b_s34b_b79k"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch_size: int = 64

    needs = ("pixels", "texts")
    gpu = 0.1
    columns = {
        "cosine": pa.float32(),
        "cosines": pa.list_(pa.float32()),
        "image": pa.list_(pa.float16()),
        "text": pa.list_(pa.float16()),
    }

    @property
    def dtype(self) -> str:
        return self.precision

    def content_hashes(self) -> dict[str, str]:
        return clip_hashes(self.model, self.weights)

    def check(self) -> None:
        check_clip(self.model, self.weights)

    def score(self, batch: Batch) -> Mapping[str, Values]:
        from filters import clip_model  # torch and open_clip: seconds

        model = clip_model.load(self.model, self.weights, self.precision)
        looks = {i: image for i, image in enumerate(batch.pixels) if image is not None}
        images = dict(zip(looks, model.embed_images(list(looks.values()), self.batch_size), strict=True))
        texts = [[entry["text"] for entry in entries or []] for entries in batch["texts"]]
        written = list(dict.fromkeys(text for row in texts for text in row if text and text.strip()))
        embedded = dict(zip(written, model.embed_texts(written, self.batch_size), strict=True))
        aligned = [[embedded.get(text) for text in row] for row in texts]
        cosines = [_cosines(images.get(i), row) for i, row in enumerate(aligned)]
        return {
            "cosine": [row[0] if row else None for row in cosines],
            "cosines": cosines,
            "image": [_half(images.get(i)) for i in range(len(batch))],
            "text": [_half(row[0]) if row else None for row in aligned],
        }


def _cosines(image_D: np.ndarray | None, texts: Sequence[np.ndarray | None]) -> list[float | None] | None:
    if image_D is None:
        return None
    found = [None if text_D is None else float(image_D @ text_D) for text_D in texts]
    return [None if value is None or math.isnan(value) else max(-1.0, min(1.0, value)) for value in found]


def _half(vector_D: np.ndarray | None) -> np.ndarray | None:
    return None if vector_D is None or not np.isfinite(vector_D).all() else vector_D.astype(np.float16)
