"""What `blip_caption` and `blip_match` share: loading a BLIP of transformers' format, and its pictures.

A model is loaded once per process and again only where its files change; it computes in fp32. No code of a model's own
is run, no pickle is read.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from filters.weights import Stamp, blip_folder, stamp

if TYPE_CHECKING:
    import torch

CAPTIONS, MATCHES = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"


def load(weights: str, architecture: str) -> tuple[Any, Any]:
    """(model, BlipProcessor), in evaluation mode, on the GPU where there is one."""
    folder = blip_folder(weights, architecture)
    return _load(folder, architecture, stamp(folder))


@functools.lru_cache(maxsize=4)
def _load(folder: Path, architecture: str, _stamp: Stamp) -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = getattr(transformers, architecture).from_pretrained(folder, use_safetensors=True, local_files_only=True)
    processor = transformers.BlipProcessor.from_pretrained(folder, local_files_only=True)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor


def pictures(processor: Any, pixels: Sequence[np.ndarray], device: "torch.device") -> "torch.Tensor":
    """(N, 3, side, side) float32, resized and normalised as the processor says, images (H, W, 3) uint8."""
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as V

    settings = processor.image_processor
    size = [settings.size["height"], settings.size["width"]]
    planes = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in pixels]
    small = torch.stack([V.resize(p, size, InterpolationMode.BICUBIC, antialias=True) for p in planes]).to(device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (settings.image_mean, settings.image_std))
    return (small.float() / 255 - mean) / std
