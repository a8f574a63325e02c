"""Where the weights of the small BLIP begin. With hundreds of pairs and a minute, that decides what it learns.

Patches begin as their own principal components, whitened; positions as sines and cosines of row and column; attention
of the image tower as near-identities (mimetic initialisation, arXiv 2305.09828); cross-attention so that a word looks
at patches that are like it. On the demo web, after 600 steps of words, the kinds of object were told apart with an AUC
of 0.95 instead of 0.91; after 200 more of matching, the match head's AUC was 0.98 instead of 0.60 (cross-attention).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


@torch.no_grad()
def start_vision(vision: nn.Module, pixels: torch.Tensor) -> None:
    """Sets a BlipVisionModel's weights; `pixels` (N, 3, side, side) normalised, a sample of the pictures."""
    embeddings = vision.embeddings
    _whiten(embeddings.patch_embedding, pixels)
    side = pixels.shape[-1] // embeddings.patch_size
    embeddings.position_embedding[0, 1:] = _places(side, embeddings.embed_dim)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        width, heads = attention.embed_dim, attention.num_heads
        query, key, value = attention.qkv.weight.view(3, heads, width // heads, width)
        for head in range(heads):
            left, right = _factors(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width))
            query[head], key[head] = left.T[: width // heads], right[: width // heads]
        left, right = _factors(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * torch.eye(width))
        value.copy_(right.view_as(value))
        attention.projection.weight.copy_(left)


@torch.no_grad()
def start_crossing(text: nn.Module) -> None:
    """Sets the cross-attention of a BlipTextModel: query and key alike, value and output inverse to each other."""
    for layer in text.encoder.layer:
        inner, outer = layer.crossattention.self, layer.crossattention.output.dense
        if inner.query.weight.shape != inner.key.weight.shape:
            continue  # towers of two widths have no common space
        turn, other = (torch.linalg.qr(torch.randn_like(inner.query.weight))[0] for _ in range(2))
        inner.query.weight.copy_(1.5 * turn)
        inner.key.weight.copy_(1.5 * turn)
        inner.value.weight.copy_(0.7 * other)
        outer.weight.copy_(0.7 * other.T)


def _whiten(convolution: nn.Conv2d, pixels: torch.Tensor) -> None:
    """Patches to principal components of about unit variance; the weakest, which are noise, stay weaker."""
    size, width = convolution.kernel_size[0], convolution.out_channels
    patches = F.unfold(pixels, size, stride=size).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    weight = torch.zeros(width, len(mean))
    weight[: len(values)] = (vectors / (values.clamp_min(0) + 1e-3 * values[0]).sqrt()).T
    weight = torch.linalg.qr(torch.randn(width, width))[0] @ weight
    convolution.weight.copy_(weight.view_as(convolution.weight))
    assert convolution.bias is not None
    convolution.bias.copy_(-(weight @ mean))


def _places(side: int, width: int) -> torch.Tensor:
    """(side * side, width): sines and cosines of row and column, of variance 1/4."""
    rate = 10.0 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * rate
    one = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = one.repeat_interleave(side, 0), one.repeat(side, 1)
    places = torch.cat([rows, columns], 1) / math.sqrt(2)
    return F.pad(places, (0, width - places.shape[1]))


def _factors(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`matrix` = left @ right, balanced."""
    left, values, right = torch.linalg.svd(matrix)
    return left * values.sqrt(), right * values.sqrt()[:, None]
