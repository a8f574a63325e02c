"""FLOPs of a step that are of use: the examples' own tokens forwards, and twice these backwards where a part learns.

A block's are 24·width² of matrix products for each token and 4·width·length² of attention for each segment; what is
locked is computed forwards alone. A head on columns has its matrices. Embeddings, norms and projections are left out,
and what is computed again (accumulation, checkpointing) isn't counted.
"""

from typing import Any

from torch import nn

from training.data import Batch
from training.models.clip import Towers
from training.models.locked import Head, Rows
from training.models.transformer import Transformer


def step_flops(model: nn.Module, batch: Batch) -> float:
    """Of this rank's part of a step. A BLIP's aren't counted: 0."""
    if not isinstance(model, Towers):
        return 0.0
    image, text = model.visual, model.head or model
    return sum(_tower(image, images) + _tower(text, texts) for images, texts in batch.parts)


def _tower(tower: Any, packed: Any) -> float:
    if isinstance(packed, Rows):
        return _head(tower, len(packed.values))
    own: Transformer = tower.transformer
    width, tail = own.resblocks[0].attn.out_proj.in_features, packed.layout.tokens - packed.useful
    segments = [(run.times, run.length) for run in packed.layout.runs] + [(-1, tail)]  # the tail is no example
    forward = sum(times * (24.0 * width * width * n + 4.0 * width * n * n) for times, n in segments)
    return forward * sum(3 if _learns(block) else 1 for block in own.resblocks)


def _head(head: Head, rows: int) -> float:
    products = sum(2.0 * layer.weight.numel() for layer in head.layers if isinstance(layer, nn.Linear))
    return rows * products * (3 if _learns(head) else 1)


def _learns(part: nn.Module) -> bool:
    return any(p.requires_grad for p in part.parameters())
