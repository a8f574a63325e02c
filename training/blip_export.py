"""Between the packed BLIP and the folders of transformers' `BlipForConditionalGeneration` and
`BlipForImageTextRetrieval`, tokenizer and processor included.

Each folder is a whole model of its own, which transformers alone loads. Read back, one folder gives what it holds: a
captioner has no encoder's self-attention and no heads for contrast and matching, a matcher no decoder's; two folders
of one training give the whole again. Weights are read from safetensors alone, and no code of a folder is run.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pairs.errors import PairmillError
from training.checkpoint import Facts, publishing
from training.models.blip import PackedBlip, Sizes
from training.tokens import marked

CAPTIONER, MATCHER = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"
TEXT = {CAPTIONER: "text_decoder.bert.", MATCHER: "text_encoder."}
SELF = {CAPTIONER: "write", MATCHER: "read"}  # whose self-attention each holds
VISION_LAYER = {
    "ln_1": "layer_norm1", "attn.in_proj_": "self_attn.qkv.", "attn.out_proj": "self_attn.projection",
    "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
WHOLE = {
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_post": "vision_model.post_layernorm",
}
HEADS = {
    CAPTIONER: {
        "word_dense": "text_decoder.cls.predictions.transform.dense",
        "word_ln": "text_decoder.cls.predictions.transform.LayerNorm",
    },
    MATCHER: {"vision_proj": "vision_proj", "text_proj": "text_proj", "match_head": "itm_head"},
}
Weights = dict[str, Tensor]
KINDS = ("weight", "bias")


def names(sizes: Sizes, architecture: str) -> dict[str, list[str]]:
    """Our parameters and the one or more of transformers' that each is made of, one below the other."""
    text, own = TEXT[architecture], SELF[architecture]
    told = {
        "visual.class_embedding": ["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": ["vision_model.embeddings.position_embedding"],
        "text.token_embedding.weight": [f"{text}embeddings.word_embeddings.weight"],
        "text.positional_embedding.weight": [f"{text}embeddings.position_embeddings.weight"],
    }
    if architecture == CAPTIONER:
        told["word_bias"] = ["text_decoder.cls.predictions.bias"]
    for kind in KINDS:
        pairs = WHOLE | HEADS[architecture] | {"text.ln_embedding": f"{text}embeddings.LayerNorm"}
        told |= {f"{ours}.{kind}": [f"{theirs}.{kind}"] for ours, theirs in pairs.items()}
        for i in range(sizes.vision[0]):
            block, layer = f"visual.transformer.resblocks.{i}.", f"vision_model.encoder.layers.{i}."
            for ours, theirs in VISION_LAYER.items():
                dot = "" if ours.endswith("_") else "."
                told[f"{block}{ours}{dot}{kind}"] = [f"{layer}{theirs}{'.' * bool(dot)}{kind}"]
        for i in range(sizes.text[0]):
            told |= _text_layer(f"text.layers.{i}.", f"{text}encoder.layer.{i}.", own, kind)
    return told


def _text_layer(ours: str, theirs: str, own: str, kind: str) -> dict[str, list[str]]:
    attention, cross = f"{theirs}attention.", f"{theirs}crossattention."
    return {
        f"{ours}{own}.in_proj_{kind}": [f"{attention}self.{part}.{kind}" for part in ("query", "key", "value")],
        f"{ours}{own}.out_proj.{kind}": [f"{attention}output.dense.{kind}"],
        f"{ours}ln_{own}.{kind}": [f"{attention}output.LayerNorm.{kind}"],
        f"{ours}cross.q.{kind}": [f"{cross}self.query.{kind}"],
        f"{ours}cross.kv.{kind}": [f"{cross}self.{part}.{kind}" for part in ("key", "value")],
        f"{ours}cross.out_proj.{kind}": [f"{cross}output.dense.{kind}"],
        f"{ours}ln_cross.{kind}": [f"{cross}output.LayerNorm.{kind}"],
        f"{ours}mlp.c_fc.{kind}": [f"{theirs}intermediate.dense.{kind}"],
        f"{ours}mlp.c_proj.{kind}": [f"{theirs}output.dense.{kind}"],
        f"{ours}ln_mlp.{kind}": [f"{theirs}output.LayerNorm.{kind}"],
    }


def config(sizes: Sizes, tokenizer: Any, label_smoothing: float = 0.1) -> transformers.BlipConfig:
    """transformers' configuration; `tokenizer` names the marks."""
    (layers, width, heads), (text_layers, text_width, text_heads) = sizes.vision, sizes.text
    vision = {
        "image_size": sizes.image_px, "patch_size": sizes.patch_px, "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": 4 * width, "num_attention_heads": heads, "layer_norm_eps": sizes.vision_eps,
        "initializer_range": 0.02,
    }  # fmt: skip
    text = {
        "vocab_size": sizes.vocabulary, "hidden_size": text_width, "num_hidden_layers": text_layers,
        "intermediate_size": 4 * text_width, "num_attention_heads": text_heads, "layer_norm_eps": sizes.text_eps,
        "max_position_embeddings": sizes.context, "label_smoothing": label_smoothing,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id,
    }  # fmt: skip
    return transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=sizes.embed_dim)


def sizes_of(config: transformers.BlipConfig) -> Sizes:
    """The sizes of a published model; a ValueError where it is built otherwise than ours."""
    v, t = config.vision_config, config.text_config
    for part in (v, t):
        if part.hidden_act != "gelu" or part.intermediate_size != 4 * part.hidden_size:
            raise ValueError(f"{part.hidden_act} and {part.intermediate_size} inner units, not gelu and 4 x the width")
    return Sizes(
        v.image_size, v.patch_size, (v.num_hidden_layers, v.hidden_size, v.num_attention_heads),
        (t.num_hidden_layers, t.hidden_size, t.num_attention_heads), config.image_text_hidden_size, t.vocab_size,
        t.max_position_embeddings, v.layer_norm_eps, t.layer_norm_eps,
    )  # fmt: skip


def to_transformers(sizes: Sizes, weights: Weights, architecture: str, tokenizer: Any) -> transformers.PreTrainedModel:
    """A whole model of transformers' class, on the host, with copies of our `weights` in float32."""
    theirs = getattr(transformers, architecture)(config(sizes, tokenizer)).eval()
    target = theirs.state_dict()  # ties are kept: a state dict holds the tensors themselves
    with torch.no_grad():
        for ours, parts in names(sizes, architecture).items():
            for name, piece in zip(parts, weights[ours].detach().cpu().chunk(len(parts)), strict=True):
                target[name].copy_(piece.reshape(target[name].shape))
    return theirs  # type: ignore[no-any-return]


def save(folder: Path, sizes: Sizes, weights: Weights, architecture: str, processor: Any, facts: Facts) -> None:
    """Publishes a folder that `from_pretrained` loads, of our state dict, with a card of the `facts` in it."""
    transformers.utils.logging.disable_progress_bar()
    with publishing(folder, facts) as temporary:
        to_transformers(sizes, weights, architecture, processor.tokenizer).save_pretrained(temporary)
        processor.save_pretrained(temporary)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise PairmillError(
            expected=f"{CAPTIONER} or {MATCHER} in transformers' format (safetensors, tokenizer, processor)",
            found=f"{folder}: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            remedy="name such a folder; `save_pretrained` of model and processor writes one",
        ) from error


def opened(folder: Path, processor: Any = None) -> tuple[str, Sizes, Any]:
    """Architecture, sizes and BlipProcessor (if none is given) of a folder whose weights stay unread."""
    with _readable(folder):
        settings = transformers.BlipConfig.from_pretrained(folder, local_files_only=True)
        architecture = (settings.architectures or ["no architecture"])[0]
        if architecture not in TEXT:
            raise ValueError(f"architecture {architecture}")
        sizes = sizes_of(settings)
        processor = processor or transformers.BlipProcessor.from_pretrained(folder, local_files_only=True)
        begins, words = settings.text_config.bos_token_id, marked(processor.tokenizer)
        if words.bos_token_id != begins or len(words) > sizes.vocabulary:
            own = f"{words.bos_token} is {words.bos_token_id} of {len(words)}"
            raise ValueError(f"{begins} begins a text of {sizes.vocabulary} pieces, and the tokenizer's {own}")
    return architecture, sizes, processor


def load(*folders: Path, backend: str = "auto") -> tuple[PackedBlip, Any]:
    """The model and its BlipProcessor, from a captioner's folder, a matcher's, or both; what both hold comes from the
    first. What none holds begins anew, but for self-attention: the one starts as a copy of the other."""
    found: Weights = {}
    model, processor = None, None
    for folder in folders:
        architecture, sizes, processor = opened(folder, processor)
        with _readable(folder):
            theirs = getattr(transformers, architecture).from_pretrained(
                folder, use_safetensors=True, local_files_only=True
            )
        model = model or PackedBlip(sizes, backend)
        if model.sizes != sizes:
            raise PairmillError(expected=f"{model.sizes} in {folder}", found=str(sizes), remedy="load one training's")
        found = _read(theirs.state_dict(), model, architecture) | found
    assert model is not None, "a folder at least"
    own = model.state_dict()
    for name in own.keys() - found.keys():
        twin = name.replace("write", "read") if "write" in name else name.replace("read", "write")
        found[name] = found[twin] if twin in found and twin != name else own[name]
    model.load_state_dict(found)
    return model.eval(), processor


def _read(weights: Weights, model: PackedBlip, architecture: str) -> Weights:
    own = model.state_dict()
    return {
        ours: torch.cat([weights[part] for part in parts]).reshape(own[ours].shape).to(own[ours])
        for ours, parts in names(model.sizes, architecture).items()
    }
