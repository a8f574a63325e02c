"""Small weights, made offline, for the filters that need some: filter's name → settings with a tiny model in a folder.

The contract test takes the settings of any other filter as its defaults. A filter that loads a model gets a line here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def clip_folder(folder: Path) -> dict[str, Any]:
    """A CLIP of 0.1 M parameters besides its vocabulary, in open_clip's local format."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIP(**TINY_CLIP)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": preprocess}))
    return {"weights": str(folder)}


WEIGHTS: dict[str, Callable[[Path], dict[str, Any]]] = {"clip": clip_folder}
