"""Between a recipe's ModelSpec, the packed model, and a folder that open_clip loads (`local-dir:FOLDER`).

The folder holds `open_clip_config.json`, `open_clip_model.safetensors` and `model_card.json` (settings, plan, steps).
Nothing in it tells when, where or how fast it was made: models are known by the hash of their folder, and a killed
training has to end in the same one. It is published whole. `load` reads such a folder back into the packed model,
whoever wrote it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from pairs.errors import PairmillError
from pairs.recipe import ModelSpec, TowerSpec
from training.checkpoint import publishing
from training.models.clip import MEAN, STD, PackedClip
from training.tokens import Ids

CONFIG, WEIGHTS, CARD = "open_clip_config.json", "open_clip_model.safetensors", "model_card.json"


def build(spec: ModelSpec, seed: int, attention: str = "auto") -> PackedClip:
    """The model of `spec` with the weights that `seed` gives."""
    torch.manual_seed(seed)
    vision, text = ((t.layers, t.width, t.heads) for t in (spec.vision, spec.text))
    return PackedClip(
        spec.embed_dim, spec.image_px, spec.patch_px, vision, text, spec.context, spec.vocabulary, attention,
        spec.logit_scale, spec.logit_bias,
    )  # fmt: skip


def whole_table(spec: ModelSpec, seed: int, used: Ids, rows: Tensor) -> Tensor:
    """The token table as it would be had all of it been trained: `rows` at `used`, first values elsewhere."""
    table = build(spec, seed).token_embedding.weight.detach().clone()
    table[torch.from_numpy(used)] = rows.detach().cpu().float()
    return table


def config(spec: ModelSpec) -> dict[str, Any]:
    """open_clip's configuration of `spec`. Images are squashed into the square, so that nothing is cut away."""
    starts = {"init_logit_scale": spec.logit_scale, "init_logit_bias": spec.logit_bias}
    return {
        "model_cfg": {
            **{name: value for name, value in starts.items() if spec.logit_bias is not None},
            "embed_dim": spec.embed_dim,
            "vision_cfg": {
                "image_size": spec.image_px,
                "patch_size": spec.patch_px,
                "layers": spec.vision.layers,
                "width": spec.vision.width,
                "head_width": spec.vision.width // spec.vision.heads,
            },
            "text_cfg": {
                "context_length": spec.context,
                "vocab_size": spec.vocabulary,
                "layers": spec.text.layers,
                "width": spec.text.width,
                "heads": spec.text.heads,
            },
        },
        "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"},
    }


def save(folder: Path, spec: ModelSpec, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Publishes `folder`; `weights` are the packed model's whole state dict, `facts` the model card's."""
    with publishing(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config(spec), indent=2))
        (temporary / CARD).write_text(json.dumps(facts, indent=2, sort_keys=True))
        whole = {name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}
        (temporary / WEIGHTS).write_bytes(to_bytes(whole, metadata={"format": "pt"}))


def load(folder: Path, attention: str = "auto") -> tuple[PackedClip, ModelSpec]:
    """The packed model in eval mode, from a folder that `save` or open_clip wrote."""
    try:
        cfg = json.loads((folder / CONFIG).read_text())["model_cfg"]
        v, t = cfg["vision_cfg"], cfg["text_cfg"]
        spec = ModelSpec(
            embed_dim=cfg["embed_dim"],
            image_px=v["image_size"],
            patch_px=v["patch_size"],
            vision=TowerSpec(layers=v["layers"], width=v["width"], heads=v["width"] // v["head_width"]),
            text=TowerSpec(layers=t["layers"], width=t["width"], heads=t["heads"]),
            context=t["context_length"],
            vocabulary=t["vocab_size"],
            logit_bias=cfg.get("init_logit_bias"),
        )
        model = build(spec, 0, attention)
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise PairmillError(
            expected=f"a CLIP in open_clip's folder format ({CONFIG}, {WEIGHTS}) at {folder}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="name the folder `model` of a finished training run",
        ) from error
    return model.eval(), spec
