"""SigLIP's towers over packed patches and tokens: no class token, attention pooling, a text tower that sees both ways.

Weights are exchanged with open_clip's, whose image tower is timm's: `from_open_clip` and `to_open_clip` rename them.
The published text tower attends to its padding, so here a text is always `context` tokens, padding included: they are
that model's input, not waste of ours. SigLIP: arXiv 2303.15343. Legend: T tokens, S segments, D width, N heads.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.attention import Layout
from training.models.clip import Towers, pixels, resized
from training.models.transformer import Mlp, Transformer
from training.packing import SIGLIP, PackedImages, PackedTexts

HALF, EPS = (0.5, 0.5, 0.5), 1e-6
NAMES = [  # open_clip's, ours
    (r"^visual\.trunk\.patch_embed\.proj\.", "visual.conv1."),
    (r"^visual\.trunk\.pos_embed$", "visual.positional_embedding"),
    (r"^visual\.trunk\.norm\.", "visual.ln_post."),
    (r"^visual\.trunk\.attn_pool\.mlp\.fc1\.", "visual.pool.mlp.c_fc."),
    (r"^visual\.trunk\.attn_pool\.mlp\.fc2\.", "visual.pool.mlp.c_proj."),
    (r"^visual\.trunk\.attn_pool\.", "visual.pool."),
    (r"^visual\.trunk\.blocks\.(\d+)\.norm1\.", r"visual.transformer.resblocks.\1.ln_1."),
    (r"^visual\.trunk\.blocks\.(\d+)\.norm2\.", r"visual.transformer.resblocks.\1.ln_2."),
    (r"^visual\.trunk\.blocks\.(\d+)\.attn\.qkv\.", r"visual.transformer.resblocks.\1.attn.in_proj_"),
    (r"^visual\.trunk\.blocks\.(\d+)\.attn\.proj\.", r"visual.transformer.resblocks.\1.attn.out_proj."),
    (r"^visual\.trunk\.blocks\.(\d+)\.mlp\.fc1\.", r"visual.transformer.resblocks.\1.mlp.c_fc."),
    (r"^visual\.trunk\.blocks\.(\d+)\.mlp\.fc2\.", r"visual.transformer.resblocks.\1.mlp.c_proj."),
    (r"^text\.", ""),
]


class LatentPool(nn.Module):
    """One learned query attends to each segment; then a residual MLP. (S, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(width**-0.5 * torch.randn(1, 1, width))
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, EPS), Mlp(width)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        q_NH = self.q(self.latent).view(self.heads, -1)
        k_TNH, v_TNH = self.kv(x_TD).unflatten(1, (2, self.heads, -1)).unbind(1)
        lengths = layout.cu_seqlens.diff()
        segment_T = torch.arange(len(lengths), device=x_TD.device).repeat_interleave(lengths, output_size=len(x_TD))
        score_TN = (k_TNH * q_NH).sum(-1).float() * q_NH.shape[-1] ** -0.5
        index_TN = segment_T[:, None].expand_as(score_TN)
        most_SN = score_TN.new_full((len(lengths), self.heads), -torch.inf).scatter_reduce(
            0, index_TN, score_TN.detach(), "amax"
        )
        weight_TN = (score_TN - most_SN[segment_T]).exp()
        sum_SN = weight_TN.new_zeros(most_SN.shape).index_add(0, segment_T, weight_TN)
        share_TN = (weight_TN / sum_SN[segment_T]).to(v_TNH)
        out_SNH = v_TNH.new_zeros(len(lengths), *v_TNH.shape[1:]).index_add(0, segment_T, share_TN[..., None] * v_TNH)
        x_SD = self.proj(out_SNH.flatten(1))
        pooled: Tensor = x_SD + self.mlp(self.norm(x_SD))
        return pooled


class MapVision(nn.Module):
    """Packed images to features (images, D)."""

    def __init__(self, grid: int, patch_px: int, width: int, layers: int, heads: int, backend: str) -> None:
        super().__init__()
        self.grid = grid
        self.conv1 = nn.Conv2d(3, width, patch_px, patch_px)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(grid * grid, width))
        self.transformer = Transformer(width, layers, heads, backend, EPS)
        self.ln_post, self.pool = nn.LayerNorm(width, EPS), LatentPool(width, heads)

    def forward(self, images: PackedImages) -> Tensor:
        x_TD = pixels(images, HALF, HALF).to(self.conv1.weight)
        x_TD = F.linear(x_TD, self.conv1.weight.flatten(1), self.conv1.bias)
        with torch.autocast(x_TD.device.type, enabled=False):
            places = resized(self.positional_embedding, self.grid, images.grids)
        x_TD = self.transformer(x_TD + places[images.place - 1], images.layout)
        pooled_SD: Tensor = self.pool(self.ln_post(x_TD), images.layout)
        return pooled_SD[images.pool]


class PackedSiglip(Towers):
    """SigLIP's towers. `vision` and `text` are (layers, width, heads); both are as wide as the embedding."""

    form = SIGLIP

    def __init__(
        self,
        embed_dim: int,
        image_px: int,
        patch_px: int,
        vision: tuple[int, int, int],
        text: tuple[int, int, int],
        context: int,
        vocabulary: int,
        backend: str,
        logit_scale: float,
        logit_bias: float,
    ) -> None:
        super().__init__()
        layers, width, heads = vision
        assert width == embed_dim, (width, embed_dim)
        self.visual = MapVision(image_px // patch_px, patch_px, width, layers, heads, backend)
        layers, width, heads = text
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context, width))
        self.transformer = Transformer(width, layers, heads, backend, EPS)
        self.ln_final, self.text_projection = nn.LayerNorm(width, EPS), nn.Linear(width, embed_dim)
        self.logit_scale, self.logit_bias = (nn.Parameter(torch.tensor(x)) for x in (logit_scale, logit_bias))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, texts: PackedTexts) -> Tensor:
        x_TD = self.token_embedding(texts.tokens) + self.positional_embedding[texts.positions]
        features: Tensor = self.text_projection(self.ln_final(self.transformer(x_TD, texts.layout)[texts.pool]))
        return features


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's SigLIP with our names."""
    found = {}
    for name, tensor in weights.items():
        for theirs, ours in NAMES:
            name = re.sub(theirs, ours, name)
        found[name] = tensor[0] if name == "visual.positional_embedding" else tensor
    return found


def to_open_clip(weights: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict with the names and shapes of `theirs`, any state dict of the same architecture."""
    ours = {their: next(iter(from_open_clip({their: tensor}))) for their, tensor in theirs.items()}
    return {their: weights[own].reshape(theirs[their].shape) for their, own in ours.items()}
