"""Small weights, made offline, for the filters that need some: filter's name → settings with a tiny model in a folder.

The contract test takes the settings of any other filter as its defaults. A filter that loads a model gets a line here.
The numbers come from numpy, whose generator gives the same bits on every machine: golden scores hang on them.
"""

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.filters.onnx_file import write_colour_classifier

os.environ["HF_HUB_OFFLINE"] = "1"  # a forgotten line below shows at once, instead of after minutes of retries

TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def filled(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """The model's state dict with every float drawn anew: weights around 0, scales of norms around 1."""
    chance = np.random.default_rng(seed)
    state = {}
    for name, value in sorted(model.state_dict().items()):
        drawn = chance.standard_normal(tuple(value.shape), np.float32) * np.float32(0.2)
        is_scale = value.ndim == 1 and name.endswith("weight")
        floats = value.is_floating_point() and name != "logit_scale"
        state[name] = torch.from_numpy(np.asarray(drawn + np.float32(is_scale))) if floats else value.clone()
    model.load_state_dict(state)
    return state


def clip_folder(folder: Path) -> dict[str, Any]:
    """A CLIP of 0.1 M parameters besides its vocabulary, in open_clip's local format."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    save_file(filled(CLIP(**TINY_CLIP)), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, "preprocess_cfg": preprocess}))
    return {"weights": str(folder)}


def blip_folder(folder: Path, architecture: str) -> dict[str, Any]:
    """A BLIP of two narrow layers with one piece per letter, as `save_pretrained` leaves it."""
    import transformers

    from pairs.pretrain import BlipSpec, TowerSpec
    from training.blip import blip_config

    tower = TowerSpec(layers=1, width=32, heads=2)
    spec = BlipSpec(image_px=32, patch_px=8, vision=tower, text=tower, embed_dim=16, vocabulary=64)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *letters, *(f"##{c}" for c in letters)]
    tokenizer = transformers.BertTokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)},
        model_max_length=spec.max_tokens,
        bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
    )
    model = getattr(transformers, architecture)(blip_config(spec, tokenizer))
    filled(model)
    if architecture == "BlipForConditionalGeneration":  # random weights would hardly ever end a caption
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[tokenizer.sep_token_id] += 4
    model.save_pretrained(folder)
    images = transformers.BlipImageProcessor(size={"height": spec.image_px, "width": spec.image_px})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return {"weights": str(folder), "precision": "fp32"}  # golden scores are those of any machine


def probe_head(folder: Path) -> dict[str, Any]:
    """A head of two layers on the tiny CLIP's embedding."""
    from safetensors.torch import save_file

    head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    save_file(filled(head), folder / "head.safetensors")
    return {"weights": str(folder / "head.safetensors"), "activation": "relu", "output": "sigmoid"}


def colour_classifier(folder: Path) -> dict[str, Any]:
    """An ONNX model that names an image's strongest colour."""
    write_colour_classifier(folder / "model.onnx", np.eye(3), 8)
    labels = {"labels": ["red", "green", "blue"], "positive": "red", "top_k": 2}
    return {"model": str(folder / "model.onnx"), "size_px": 8} | labels


WEIGHTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "clip": clip_folder,
    "probe": probe_head,
    "image_classifier": colour_classifier,
    "blip_caption": functools.partial(blip_folder, architecture="BlipForConditionalGeneration"),
    "blip_match": functools.partial(blip_folder, architecture="BlipForImageTextRetrieval"),
}
