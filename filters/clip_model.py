"""CLIP models through open_clip's public loader: by tag, from a folder, or with random weights.

A model is loaded once per process. Importing torch and open_clip takes seconds, so `filters/clip.py` imports this
only when there is something to score.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from filters.weights import SEED, Stamp, clip_path, stamp

LONGEST = 2_000  # characters; CLIP's 77 tokens are about 350


@dataclass(frozen=True)
class Loaded:
    """A model on its device, with its tokenizer and what its images have to look like."""

    model: Any
    tokenizer: Any
    preprocess: Mapping[str, Any]
    device: torch.device
    precision: torch.dtype

    def embed_images(self, images: Sequence[np.ndarray], at_most: int) -> np.ndarray:
        """Normalised float32 [N, D] of HxWx3 uint8 images."""
        prepared = [prepare(image, self.preprocess) for image in images]
        return self._embed(prepared, self._image_chunk, at_most)

    def embed_texts(self, texts: Sequence[str], at_most: int) -> np.ndarray:
        """Normalised float32 [N, D]; what passes the model's context is cut off by its tokenizer."""
        tokens = list(self.tokenizer([_bounded(text) for text in texts])) if texts else []
        return self._embed(tokens, self.model.encode_text, at_most)

    def _image_chunk(self, pixels_N3HW: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(self.preprocess[name], device=self.device).view(3, 1, 1) for name in ("mean", "std"))
        scale, shift, cached = 1 / (255 * std), -mean / std, 4 if self.device.type == "cpu" else len(pixels_N3HW)
        parts = (torch.addcmul(shift, part.float(), scale).to(self.precision) for part in pixels_N3HW.split(cached))
        return self.model.encode_image(torch.cat(list(parts)))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _embed(self, inputs: list[torch.Tensor], encode: Any, at_most: int) -> np.ndarray:
        chunks = [torch.stack(inputs[i : i + at_most]).to(self.device) for i in range(0, len(inputs), at_most)]
        embedded = [F.normalize(encode(chunk).float(), dim=-1).cpu().numpy() for chunk in chunks]
        return np.concatenate(embedded) if embedded else np.zeros((0, 0), np.float32)


def _bounded(text: str) -> str:
    """A text's beginning, more than any model's context holds: tokenizers take time for all that they are given."""
    return text if len(text) <= LONGEST else " ".join(text[: 10 * LONGEST].split())[:LONGEST]


def prepare(image: np.ndarray, preprocess: Mapping[str, Any]) -> torch.Tensor:
    """An HxWx3 uint8 image as uint8 [3, h, w] of the model's size; `resize_mode` is shortest (its centre is cut
    out), longest (padded) or squash."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels_3HW = torch.from_numpy(image).permute(2, 0, 1)
    to = _resized(image.shape[:2], (height, width), preprocess["resize_mode"])
    kind = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
    resized = F.interpolate(pixels_3HW[None], size=to, mode=kind, antialias=True)[0]
    return _fit(resized, height, width, preprocess.get("fill_color") or 0)


def _resized(sides: tuple[int, ...], size: tuple[int, int], mode: str) -> tuple[int, ...]:
    """Height and width before cutting or padding, rounded as open_clip's transforms round: torchvision's resize to the
    shorter side, which serves squares, truncates."""
    if mode == "squash":
        return size
    if mode == "shortest" and size[0] == size[1]:
        return tuple(size[0] * side // min(sides) for side in sides)
    scale = {"shortest": max, "longest": min}[mode](to / side for to, side in zip(size, sides, strict=True))
    return tuple(max(1, round(side * scale)) for side in sides)


def _fit(pixels_3HW: torch.Tensor, height: int, width: int, fill: int) -> torch.Tensor:
    """Centre crop, or padding where a side is short."""
    short = max(0, height - pixels_3HW.shape[1]), max(0, width - pixels_3HW.shape[2])
    padded = F.pad(
        pixels_3HW, (short[1] // 2, short[1] - short[1] // 2, short[0] // 2, short[0] - short[0] // 2), value=fill
    )
    top, left = round((padded.shape[1] - height) / 2), round((padded.shape[2] - width) / 2)
    return padded[:, top : top + height, left : left + width]


def load(model: str, weights: str | None, precision: str) -> Loaded:
    """The model, loaded once per process and again only where the weights' files have changed."""
    path = clip_path(model, weights)
    return _load(model, weights, path, precision, stamp(path))


@functools.lru_cache(maxsize=2)
def _load(name: str, weights: str | None, path: Path | None, precision: str, _stamp: Stamp) -> Loaded:
    import open_clip

    folder = path is not None and path.is_dir()
    source = f"local-dir:{path}" if folder else name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = open_clip.create_model(
            source,
            None if folder else weights,
            precision=precision,
            device=device,
            require_pretrained=weights is not None,
            pretrained_text=False,
        )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Loaded(model.eval(), open_clip.get_tokenizer(source), model.visual.preprocess_cfg, device, dtype)
