"""The pre-norm transformer of CLIP over packed tokens, with open_clip's parameter names and shapes.

Legend: T tokens of all segments, D width, N heads, H width of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from training.attention import Layout, attend


class Attention(nn.Module):
    """Multi-head self-attention within segments; parameters named as in nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.heads, self.backend = heads, backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        qkv = F.linear(x_TD, self.in_proj_weight, self.in_proj_bias)
        q_TNH, k_TNH, v_TNH = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        out: Tensor = self.out_proj(attend(q_TNH, k_TNH, v_TNH, layout, self.backend).flatten(1))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x_TD)))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int, backend: str, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, backend)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        x_TD = x_TD + self.attn(self.ln_1(x_TD), layout)
        out: Tensor = x_TD + self.mlp(self.ln_2(x_TD))
        return out


class Transformer(nn.Module):
    """`layers` blocks; initialised as CLIP's text tower is (residual branches scaled by depth).

    `remember` says what the backward finds: all activations; "products" of matrices alone; or "inputs" of the blocks.
    """

    remember = "all"

    def __init__(self, width: int, layers: int, heads: int, backend: str, eps: float = 1e-5) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, backend, eps) for _ in range(layers))
        for block in self.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            for bias in (block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias):
                nn.init.zeros_(bias)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        for block in self.resblocks:
            if self.remember == "all" or not torch.is_grad_enabled():
                x_TD = block(x_TD, layout)
            else:
                keep = _keep_products if self.remember == "products" else noop_context_fn
                x_TD = checkpoint(block, x_TD, layout, use_reentrant=False, context_fn=keep)
        return x_TD


def _keep_products() -> Any:
    """Selective checkpointing: results of matrix products stay, all else is computed again."""
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([aten.mm.default, aten.addmm.default])
