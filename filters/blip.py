"""What `blip_caption` and `blip_match` share: loading a BLIP of transformers' format, its pictures, its layers.

The weights are transformers' modules; the passes are ours, because transformers' BLIP writes out every attention
matrix and projects an image's patches to keys and values in each text layer, once for each text (a sixth of the
image's own cost). Here attention is fused, and the projections of cross-attention are moved to the side of the
queries: for a query q and patches X, q·(K X) = (Kᵀq)·X and sum p·(V X) = V·(sum p·X). So the patches themselves serve
all layers and texts of an image, and what a text costs grows with its own few tokens.

Images are encoded in batches of one fixed shape, so that the bits of one never depend on its batch-mates. A model is
loaded once per process and again only where its files change. No code of a model's own is run, no pickle is read.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from filters.weights import Stamp, blip_folder, stamp

if TYPE_CHECKING:
    import torch

CAPTIONS, MATCHES = "BlipForConditionalGeneration", "BlipForImageTextRetrieval"
PATCHES = {"cpu": 2400, "cuda": 32768}  # of all images that are encoded at once

Precision = Literal["auto", "bf16", "fp32"]


def resolved(precision: Precision) -> Precision:
    """`auto` as what this machine is good at: bf16 where a GPU or the CPU multiplies it, else fp32."""
    if precision != "auto":
        return precision
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    able = Path("/proc/driver/nvidia/version").exists() or "avx512_bf16" in flags or "amx_bf16" in flags
    return "bf16" if able else "fp32"


def load(weights: str, architecture: str, precision: str) -> tuple[Any, Any]:
    """(model, BlipProcessor), in evaluation mode, on the GPU where there is one."""
    folder = blip_folder(weights, architecture)
    return _load(folder, architecture, precision, stamp(folder))


@functools.lru_cache(maxsize=4)
def _load(folder: Path, architecture: str, precision: str, _stamp: Stamp) -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    made = getattr(transformers, architecture)
    model = made.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    processor = transformers.BlipProcessor.from_pretrained(folder, local_files_only=True)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available():
        _pack(model, torch.ops.mkldnn)
    return model, processor


def _pack(model: Any, onednn: Any) -> None:
    """Lays the weights of linear layers out for the CPU's matrix products once, instead of at each call: an eighth
    less time for an image, a third less for a token. They are kept in that form alone."""
    import torch

    if model.dtype == torch.bfloat16 and not onednn._is_mkldnn_bf16_supported():
        return
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith(
            ("crossattention.self.key", "crossattention.self.value")
        ):
            weight = onednn._reorder_linear_weight(module.weight.data)
            module.weight = None  # type: ignore[assignment]
            module.forward = functools.partial(_linear, onednn._linear_pointwise, weight, module.bias)  # type: ignore[method-assign]


def _linear(apply: Any, weight: "torch.Tensor", bias: "torch.Tensor", x: "torch.Tensor") -> "torch.Tensor":
    return apply(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


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


def encoded(model: Any, processor: Any, pixels: Sequence[np.ndarray]) -> "Iterator[torch.Tensor]":
    """The patches (N, E) of each image, in turn; computed when asked for, some at a time, the last batch filled up."""
    from torch.nn.functional import pad

    together = max(1, PATCHES[model.device.type] // model.vision_model.embeddings.num_positions)
    for at in range(0, len(pixels), together):
        some = pictures(processor, pixels[at : at + together], model.device)
        yield from encode(model.vision_model, pad(some, (0,) * 7 + (together - len(some),)))[: len(some)]


def encode(vision: Any, pixels_B3HW: "torch.Tensor") -> "torch.Tensor":
    """(B, N, E): what a BlipVisionModel's `last_hidden_state` is."""
    x = vision.embeddings(pixels_B3HW)
    for layer in vision.encoder.layers:
        own = layer.self_attn
        q, k, v = heads(own.qkv(layer.layer_norm1(x)), 3 * own.num_heads).chunk(3, 1)
        x = x + own.projection(attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.layer_norm2(x))
    return vision.post_layernorm(x)  # type: ignore[no-any-return]


def attend(*q_k_v_BHLd: "torch.Tensor") -> "torch.Tensor":
    """Attention without a mask. A CPU's fused kernel is slow in bf16 (17 ms a layer of 577 patches where three plain
    products image by image take 12); in fp32 it is the faster one (14 against 20)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = q_k_v_BHLd
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return scaled_dot_product_attention(q, k, v)
    scale = q.shape[-1] ** -0.5
    return torch.stack(
        [((one * scale) @ keys.mT).softmax(-1) @ values for one, keys, values in zip(q, k, v, strict=True)]
    )


def heads(x_BLD: "torch.Tensor", number: int) -> "torch.Tensor":
    """(B, heads, L, width of a head)."""
    return x_BLD.unflatten(2, (number, -1)).transpose(1, 2)


def read(text: Any, ids_BL: "torch.Tensor", images_BNE: "torch.Tensor | None") -> "torch.Tensor":
    """(B, L, D): what a BlipTextModel's `last_hidden_state` is, as encoder of texts of one length; with an image for
    each text, or without."""
    x = text.embeddings(ids_BL)
    for layer in text.encoder.layer:
        own = layer.attention.self
        q, k, v = (heads(to(x), own.num_attention_heads) for to in (own.query, own.key, own.value))
        x = layer.attention.output(attend(q, k, v).transpose(1, 2).flatten(2), x)
        x = x if images_BNE is None else look(layer.crossattention, x, images_BNE)
        x = layer.output(layer.intermediate(x), x)
    return x  # type: ignore[no-any-return]


def look(cross: Any, x_BLD: "torch.Tensor", images_BNE: "torch.Tensor") -> "torch.Tensor":
    """`x` after it attended to its image: a BlipTextAttention's output without keys or values. (The keys' bias adds the
    same to all of a query's scores, so it is left out.)"""
    own, (batch, length) = cross.self, x_BLD.shape[:2]
    H, d = own.num_attention_heads, own.attention_head_size
    asked_HRE = (own.query(x_BLD) * d**-0.5).view(-1, H, d).transpose(0, 1) @ own.key.weight.view(H, d, -1)
    asked_BQE = asked_HRE.unflatten(1, (batch, length)).transpose(0, 1).flatten(1, 2)
    found_BQE = (asked_BQE @ images_BNE.mT).softmax(-1) @ images_BNE
    found_HRE = found_BQE.unflatten(1, (H, length)).transpose(0, 1).flatten(1, 2)
    seen_RHd = (found_HRE @ own.value.weight.view(H, d, -1).mT).transpose(0, 1)
    return cross.output(seen_RHd.reshape(batch, length, H * d) + own.value.bias, x_BLD)  # type: ignore[no-any-return]
