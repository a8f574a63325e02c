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
from pairs.pretrain import ModelSpec, PretrainSpec, StartSpec, TowerSpec, TowersSpec
from training.checkpoint import publishing
from training.models.clip import MEAN, STD, PackedClip, Towers
from training.models.locked import Head, part_of, plain, put_heads
from training.models.siglip import HALF, PackedSiglip, from_open_clip, to_open_clip
from training.tokens import Ids

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
HEADS = "heads.json"


TIMM = {  # SigLIP's image towers: (layers, width, heads, patch_px, image_px)
    (12, 768, 12, 16, 224): "vit_base_patch16_siglip_224",
    (12, 768, 12, 16, 256): "vit_base_patch16_siglip_256",
    (12, 768, 12, 16, 384): "vit_base_patch16_siglip_384",
    (24, 1024, 16, 16, 256): "vit_large_patch16_siglip_256",
}


def build(spec: ModelSpec, seed: int, attention: str = "auto") -> Towers:
    """The model of `spec` with the weights that `seed` gives."""
    torch.manual_seed(seed)
    vision, text = ((t.layers, t.width, t.heads) for t in (spec.vision, spec.text))
    sizes = (spec.embed_dim, spec.image_px, spec.patch_px, vision, text, spec.context, spec.vocabulary, attention)
    model: Towers
    if spec.kind == "siglip":
        assert spec.logit_bias is not None
        model = PackedSiglip(*sizes, spec.logit_scale, spec.logit_bias)
    else:
        model = PackedClip(*sizes, spec.logit_scale, spec.logit_bias, spec.positions == "factorised")
    model.tokenizer = spec.tokenizer
    return model


def begin(spec: PretrainSpec) -> Towers:
    """The model as training begins it: weights of the seed, but for towers that start from given ones."""
    model = build(spec.model, spec.seed, spec.attention)
    starts = {tower: getattr(spec.towers, tower).weights for tower in ("image", "text")}
    for name in sorted({name for name in starts.values() if name}):
        _take(model, spec.model, name, [tower for tower in starts if starts[tower] == name])
    return model


def _take(model: Towers, spec: ModelSpec, name: str, towers: list[str]) -> None:
    """Puts the weights `name` into the model's towers; where they are both, scale and bias too."""
    theirs, found = published(name)
    own = model.state_dict()
    both = ["logit_"] if len(towers) == 2 else []
    wanted = [k for k in own if part_of(k) in [*towers, *both]]
    for key in wanted:
        shapes = [list(w[key].shape) if key in w else None for w in (own, theirs)]
        if shapes[0] != shapes[1]:
            raise PairmillError(
                expected=f"pretrain.model of the sizes of {name}: {found.model_dump(exclude_defaults=True)}",
                found=f"{key} of {shapes[0]} against {shapes[1]} there",
                remedy="set embed_dim and the sizes of this tower in pretrain.model to these",
            )
    model.load_state_dict({key: theirs[key] for key in wanted}, strict=False)


def published(name: str) -> tuple[dict[str, Tensor], ModelSpec]:
    """Weights by our names and the sizes of a model: a folder in open_clip's format, or open_clip's NAME:TAG."""
    if Path(name).is_dir():
        model, spec = load(Path(name))
        return model.state_dict(), spec
    import open_clip  # seconds

    kind, _, tag = name.partition(":")
    try:
        if (cfg := open_clip.get_model_config(kind)) is None:
            raise ValueError(f"open_clip has no model {kind}")
        spec = spec_of(cfg)
        _check_trained(spec, open_clip.get_pretrained_cfg(kind, tag))
        theirs = open_clip.create_model(kind, pretrained=tag or None, require_pretrained=True)
    except Exception as error:  # a name, a tag, the hub, the cache or the file: a class of its own for each
        raise PairmillError(
            expected=f"a folder in open_clip's format, or a NAME:TAG that open_clip has, at {name}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            remedy="name the folder of a model; where no hub can be reached, copy the cache",
        ) from error
    weights = theirs.state_dict()
    return from_open_clip(weights) if spec.kind == "siglip" else weights, spec


def _check_trained(spec: ModelSpec, cfg: dict[str, Any]) -> None:
    """A ValueError where open_clip's `cfg` of weights tells of another activation or normalisation than ours."""
    if cfg.get("quick_gelu"):
        raise ValueError("weights for quick_gelu, which the packed towers don't have")
    for name, own in zip(("mean", "std"), normalisation(spec), strict=True):
        if (theirs := cfg.get(name)) and max(abs(a - b) for a, b in zip(theirs, own, strict=True)) > 1e-3:
            raise ValueError(f"weights for images of {name} {[*theirs]}; the packed {spec.kind} takes {[*own]}")


def normalisation(spec: ModelSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation, by channel, that the model takes from pixels in [0, 1]."""
    return (MEAN, STD) if spec.kind == "clip" else (HALF, HALF)


def whole_table(spec: PretrainSpec, used: Ids, rows: Tensor) -> Tensor:
    """The token table as it would be had all of it been trained: `rows` at `used`, first values elsewhere."""
    table = begin(spec).token_embedding.weight.detach().clone()
    table[torch.from_numpy(used)] = rows.detach().cpu().float()
    return table


def config(spec: ModelSpec) -> dict[str, Any]:
    """open_clip's configuration of `spec`. Images are squashed into the square, so that nothing is cut away."""
    biased = {"init_logit_scale": spec.logit_scale, "init_logit_bias": spec.logit_bias}
    text: dict[str, Any] = {
        "context_length": spec.context,
        "vocab_size": spec.vocabulary,
        "layers": spec.text.layers,
        "width": spec.text.width,
        "heads": spec.text.heads,
    }
    if spec.tokenizer != "clip":
        text |= {"hf_tokenizer_name": spec.tokenizer, "tokenizer_kwargs": {"clean": "canonicalize"}}
    vision: dict[str, Any] = {"image_size": spec.image_px}
    if spec.kind == "siglip":
        text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
        name = timm_name(spec)
        vision |= {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    else:
        v = spec.vision
        vision |= {"patch_size": spec.patch_px, "layers": v.layers, "width": v.width, "head_width": v.width // v.heads}
    mean, std = normalisation(spec)
    return {
        "model_cfg": {
            **({} if spec.logit_bias is None else biased),
            **({"custom_text": True} if spec.kind == "siglip" else {}),
            "embed_dim": spec.embed_dim,
            "vision_cfg": vision,
            "text_cfg": text,
        },
        "preprocess_cfg": {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "squash"},
    }


def timm_name(spec: ModelSpec) -> str:
    """timm's name for SigLIP's image tower; open_clip knows such towers by name alone."""
    v = spec.vision
    name = TIMM.get((v.layers, v.width, v.heads, spec.patch_px, spec.image_px))
    if name is None:
        sizes = ", ".join(f"{w} wide, {layers} layers, {px} px" for layers, w, _, _, px in TIMM)
        raise PairmillError(
            expected=f"a siglip image tower that open_clip has: {sizes}, patches of 16",
            found=f"{v.width} wide, {v.layers} layers, {spec.image_px} px, patches of {spec.patch_px}",
            remedy="take one of these, or kind: clip with objective: siglip, in any size",
        )
    return name


def public_weights(spec: ModelSpec, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The packed model's state dict as open_clip names and shapes it."""
    whole = {name: tensor.detach().cpu().float().contiguous() for name, tensor in weights.items()}
    if spec.kind == "siglip":
        return to_open_clip(whole, _theirs(spec))
    if spec.positions == "factorised":
        rows, columns = (whole.pop(f"visual.positions.{name}") for name in ("rows", "columns"))
        place = "visual.positional_embedding"
        whole[place] = torch.cat([whole[place], (rows[:, None] + columns).flatten(0, 1)])
    return whole


def _theirs(spec: ModelSpec) -> dict[str, Tensor]:
    """Names and shapes of open_clip's SigLIP of `spec`, without its memory."""
    import open_clip  # seconds

    with torch.device("meta"):
        model = open_clip.model.CustomTextCLIP(
            **{k: v for k, v in config(spec)["model_cfg"].items() if k != "custom_text"}
        )
    found: dict[str, Tensor] = model.state_dict()
    return found


def save(folder: Path, spec: ModelSpec, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Publishes `folder`; `weights` are the packed model's whole state dict, `facts` the model card's."""
    with publishing(folder, facts) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config(spec), indent=2))
        (temporary / WEIGHTS).write_bytes(to_bytes(public_weights(spec, weights), metadata={"format": "pt"}))


def load(folder: Path, attention: str = "auto") -> tuple[Towers, ModelSpec]:
    """The packed model in eval mode, from a folder that `save` or open_clip wrote."""
    try:
        told = json.loads((folder / CONFIG).read_text())
        spec = spec_of(told["model_cfg"])
        _check_trained(spec, told.get("preprocess_cfg") or {})
        model = build(spec, 0, attention)
        weights = load_file(folder / WEIGHTS)
        model.load_state_dict(from_open_clip(weights) if spec.kind == "siglip" else weights)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise PairmillError(
            expected=f"a CLIP in open_clip's folder format ({CONFIG}, {WEIGHTS}) at {folder}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="name the folder `model` of a finished training run",
        ) from error
    return model.eval(), spec


def spec_of(cfg: dict[str, Any]) -> ModelSpec:
    """The ModelSpec of open_clip's `model_cfg`; a KeyError or ValueError where that isn't one of ours."""
    v, t = cfg["vision_cfg"], cfg["text_cfg"]
    if t.get("no_causal_mask"):
        layers, width, heads, patch_px, image_px = {name: sizes for sizes, name in TIMM.items()}[v["timm_model_name"]]
        kind = {"kind": "siglip"}
    else:
        layers, width, patch_px, image_px = (v[name] for name in ("layers", "width", "patch_size", "image_size"))
        heads, kind = width // v.get("head_width", 64), {}
        if cfg.get("quick_gelu"):
            raise ValueError("quick_gelu, which the packed towers don't have")
    return ModelSpec(
        **kind,  # type: ignore[arg-type]
        tokenizer=t.get("hf_tokenizer_name", "clip"),
        embed_dim=cfg["embed_dim"],
        image_px=image_px,
        patch_px=patch_px,
        vision=TowerSpec(layers=layers, width=width, heads=heads),
        text=TowerSpec(layers=t["layers"], width=t["width"], heads=t["heads"]),
        context=t["context_length"],
        vocabulary=t["vocab_size"],
        logit_bias=cfg.get("init_logit_bias"),
    )


def save_trained(
    spec: PretrainSpec, used: Ids, folder: Path, weights: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Publishes what a training made, whose token table holds the rows `used`: for open_clip, or as heads."""
    if "token_embedding.weight" in weights:
        weights["token_embedding.weight"] = whole_table(spec, used, weights["token_embedding.weight"])
    if spec.towers.image.features or spec.towers.text.features:
        save_heads(folder, spec, weights, facts)
    else:
        save(folder, spec.model, weights, facts)


def save_heads(folder: Path, spec: PretrainSpec, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Publishes a model of heads on columns: `image_head.safetensors`, `text_head.safetensors` (each a plain
    `nn.Sequential`, as the filter `probe` reads them), what else it has (`rest.safetensors`), the columns and settings
    (`heads.json`) and the card. `weights` are its whole state dict."""
    rest = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with publishing(folder, facts) as temporary:
        for tower, prefix in (("image", "visual."), ("text", "head.")):
            if getattr(spec.towers, tower).features:
                own = {name.removeprefix(prefix): rest.pop(name) for name in [*rest] if name.startswith(prefix)}
                (temporary / f"{tower}_head.safetensors").write_bytes(to_bytes(plain(own)))
        (temporary / "rest.safetensors").write_bytes(to_bytes(rest, metadata={"format": "pt"}))
        told = {"towers": spec.towers.model_dump(), "model": spec.model.model_dump()}
        (temporary / HEADS).write_text(json.dumps(told, indent=2))


def load_heads(folder: Path, attention: str = "auto") -> tuple[Towers, TowersSpec]:
    """What `save_heads` wrote, in eval mode, and the columns that it takes as `Rows`."""
    try:
        told = json.loads((folder / HEADS).read_text())
        model, towers = build(ModelSpec(**told["model"]), 0, attention), TowersSpec(**told["towers"])
        files = {tower: folder / f"{tower}_head.safetensors" for tower in ("image", "text")}
        heads = {tower: _head(path, getattr(towers, tower)) if path.exists() else None for tower, path in files.items()}
        put_heads(model, heads["image"], heads["text"])
        model.load_state_dict(load_file(folder / "rest.safetensors"), strict=False)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise PairmillError(
            expected=f"a model of heads ({HEADS}, …) at {folder}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="name the folder `model` of a training whose towers are `features`",
        ) from error
    return model.eval(), towers


def _head(path: Path, start: StartSpec) -> Head:
    return Head.of(load_file(path), start.residual or start.lock)
