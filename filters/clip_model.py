"""CLIP models through open_clip's public loader: by tag, from a folder, or with random weights.

The weights' content is hashed for the fingerprint; a model is loaded once per process. A name that open_clip doesn't
know, a folder without weights and a hub that can't be reached are errors: open_clip itself would go on with random
weights after a warning. Importing open_clip takes seconds, so it happens only when a model is wanted.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.strict import nearest

SEED = 0  # of random weights
CONFIG = "open_clip_config.json"

Stamp = tuple[tuple[str, int, int], ...]


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
        return self._embed(list(self.tokenizer(list(texts))) if texts else [], self.model.encode_text, at_most)

    def _image_chunk(self, pixels_N3HW: torch.Tensor) -> torch.Tensor:
        mean, std = (torch.tensor(self.preprocess[name], device=self.device).view(3, 1, 1) for name in ("mean", "std"))
        return self.model.encode_image(((pixels_N3HW.float() / 255 - mean) / std).to(self.precision))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _embed(self, inputs: list[torch.Tensor], encode: Any, at_most: int) -> np.ndarray:
        chunks = [torch.stack(inputs[i : i + at_most]).to(self.device) for i in range(0, len(inputs), at_most)]
        embedded = [F.normalize(encode(chunk).float(), dim=-1).cpu().numpy() for chunk in chunks]
        return np.concatenate(embedded) if embedded else np.zeros((0, 0), np.float32)


def prepare(image: np.ndarray, preprocess: Mapping[str, Any]) -> torch.Tensor:
    """An HxWx3 uint8 image as uint8 [3, h, w] of the model's size; `resize_mode` is shortest (then the centre is cut out),
    longest (then padded) or squash."""
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels_3HW = torch.from_numpy(image).permute(2, 0, 1)
    ratios = height / image.shape[0], width / image.shape[1]
    scale = {"shortest": max(ratios), "longest": min(ratios)}.get(preprocess["resize_mode"])
    to = (height, width) if scale is None else tuple(max(1, round(side * scale)) for side in image.shape[:2])
    kind = "bilinear" if preprocess["interpolation"] == "bilinear" else "bicubic"
    resized = F.interpolate(pixels_3HW[None], size=to, mode=kind, antialias=True)[0]
    return _fit(resized, height, width, preprocess.get("fill_color") or 0)


def _fit(pixels_3HW: torch.Tensor, height: int, width: int, fill: int) -> torch.Tensor:
    """Centre crop, or padding where a side is short."""
    short = max(0, height - pixels_3HW.shape[1]), max(0, width - pixels_3HW.shape[2])
    padded = F.pad(
        pixels_3HW, (short[1] // 2, short[1] - short[1] // 2, short[0] // 2, short[0] - short[0] // 2), value=fill
    )
    top, left = round((padded.shape[1] - height) / 2), round((padded.shape[2] - width) / 2)
    return padded[:, top : top + height, left : left + width]


def content_hashes(model: str, weights: str | None) -> dict[str, str]:
    """What stands for the settings `model` and `weights` in a fingerprint."""
    path = weights_path(model, weights)
    if path is None:
        return {"model": _config(model), "weights": f"random {SEED}, torch {torch.__version__}"}
    return {"model": "its folder's" if path.is_dir() else _config(model), "weights": content_hash(path)}


def weights_path(model: str, weights: str | None) -> Path | None:
    """The folder or file that holds the weights; None for random ones."""
    if weights is not None and ("/" in weights or Path(weights).is_dir()):
        return _folder(weights)
    _check_model(model)
    return None if weights is None else _tag(model, weights)


def load(model: str, weights: str | None, precision: str) -> Loaded:
    """The model, loaded once per process and again only where the weights' files have changed."""
    path = weights_path(model, weights)
    return _load(model, weights, path, precision, _stamp(path))


def _stamp(path: Path | None) -> Stamp:
    """Changes when the weights do, without reading them: names, sizes and times of the files."""
    files = [] if path is None else sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(maxsize=2)
def _load(name: str, weights: str | None, path: Path | None, precision: str, stamp: Stamp) -> Loaded:
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


def _folder(weights: str) -> Path:
    path = Path(weights)
    found = [p.name for p in path.iterdir()] if path.is_dir() else None
    if found is None or CONFIG not in found or not any(n.endswith((".safetensors", ".bin", ".pt")) for n in found):
        raise PairmillError(
            expected=f"a folder with {CONFIG} and its weights at {weights}",
            found="no such folder" if found is None else ", ".join(sorted(found)) or "an empty folder",
            remedy="name a folder in open_clip's local format, or a tag such as laion2b_s34b_b79k",
        )
    return path.resolve()


@functools.cache
def _tag(model: str, weights: str) -> Path:
    from open_clip import pretrained

    tags = pretrained.list_pretrained_tags_by_model(model)
    config = pretrained.get_pretrained_cfg(model, weights)
    if not config:
        raise PairmillError(
            expected=f"a tag of {model}, or a folder", found=repr(weights),
            remedy=nearest(weights, tags) if tags else "name a folder; this model has no published weights",
        )  # fmt: skip
    try:
        return Path(pretrained.download_pretrained(config)).resolve()
    except Exception as error:
        raise PairmillError(
            expected=f"the weights {weights} of {model}, in the local cache or from their hub",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            remedy="fetch them where the hub can be reached and copy the cache, or set `weights` to a local folder",
        ) from error


def _check_model(name: str) -> None:
    import open_clip

    if name not in open_clip.list_models():
        raise PairmillError(
            expected="a model that open_clip has", found=repr(name), remedy=nearest(name, open_clip.list_models())
        )


def _config(name: str) -> str:
    from open_clip import get_model_config

    return json.dumps(get_model_config(name), sort_keys=True)
