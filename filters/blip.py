"""What `blip_caption` and `blip_match` share: finding, hashing and loading a BLIP of transformers' format, and its
pictures.

A folder, or a published name with its revision ("Salesforce/blip-itm-base-coco@<commit>"). A model is loaded once per
process and again only where its files change; it computes in fp32. No code of a model's own is run, no pickle is read.
"""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash

if TYPE_CHECKING:
    import torch

FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "processor_config.json"]
FILES += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]
CAPTIONS, MATCHES = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"


def blip_folder(weights: str, architecture: str) -> Path:
    """The folder of `weights`, which must hold a BLIP of that class with its tokenizer."""
    if weights == "previous":
        raise PairmillError(
            expected="a folder or a published name as `weights`",
            found="'previous', and there is no previous model",
            remedy="set `first_filter: {blip: {}}` in the recipe, so that one is trained on the trusted pairs",
        )
    folder = Path(weights) if os.path.isdir(weights) or weights.startswith(("/", ".")) else _published(weights)
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [name for name in ("config.json", "model.safetensors") if name not in names]
    missing += [] if names & {"tokenizer.json", "vocab.txt"} else ["tokenizer.json"]
    made = [] if missing else json.loads((folder / "config.json").read_text()).get("architectures") or []
    if missing or architecture not in made:
        raise PairmillError(
            expected=f"a {architecture} with its tokenizer, as save_pretrained leaves it, in {weights}",
            found=f"no {', '.join(missing)}" if missing else f"a model of {made}",
            remedy="name the folder of a trained captioner for blip_caption, of a matcher for blip_match",
        )
    return folder.resolve()


@functools.cache
def _published(weights: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = weights.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=FILES))
    except Exception as error:
        raise PairmillError(
            expected=f"the published BLIP {name} in the local cache or from its hub, or a folder of that name",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            remedy="check the name; where no hub can be reached, copy the files and set `weights` to their folder",
        ) from error


def blip_hash(weights: str, architecture: str) -> dict[str, str]:
    """The content hash of what `weights` names, by setting."""
    return {"weights": content_hash(blip_folder(weights, architecture))}


def load(weights: str, architecture: str) -> tuple[Any, Any]:
    """(model, BlipProcessor), in evaluation mode, on the GPU where there is one."""
    folder = blip_folder(weights, architecture)
    return _load(folder, architecture, tuple((p.name, p.stat().st_mtime_ns) for p in sorted(folder.iterdir())))


@functools.lru_cache(maxsize=4)
def _load(folder: Path, architecture: str, stamp: tuple[tuple[str, int], ...]) -> tuple[Any, Any]:
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
