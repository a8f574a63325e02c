"""The pre-norm transformer of CLIP over packed tokens, with open_clip's parameter names and shapes.

A block is three regions: what comes before attention, attention, and what follows. Compiled (`compile_blocks`), the
outer two are graphs without a break, one per width, whose number of tokens is symbolic; attention, whose segments
differ from step to step, stays outside, as do the blocks' hooks (FSDP gathers weights there).

Legend: T tokens of all segments, D width, N heads, H width of a head.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from training.attention import Layout, attend


class Attention(nn.Module):
    """The weights of multi-head self-attention, named as in nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.heads, self.backend = heads, backend
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, qkv_TD: Tensor, layout: Layout) -> Tensor:
        """(T, 3 · N · H) to (T, N · H), within segments."""
        q_TNH, k_TNH, v_TNH = qkv_TD.unflatten(1, (3, self.heads, -1)).unbind(1)
        return attend(q_TNH, k_TNH, v_TNH, layout, self.backend).flatten(1)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x_TD)))
        return out


class Repeated(nn.Module):
    """What a stack repeats: FSDP2 gathers its weights while it computes, and its regions may be compiled."""

    compiled = False

    def region(self, plain: Callable[..., Tensor], thrifty: bool = False) -> Callable[..., Tensor]:
        """`plain`, whose first input is this module; where compiled, the graph that all of its kind share. `thrifty`:
        whether the graph keeps products alone for the backward."""
        return _graph(plain, thrifty) if self.compiled else plain


class Block(Repeated):
    def __init__(self, width: int, heads: int, backend: str, eps: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps)
        self.attn = Attention(width, heads, backend)
        self.ln_2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width)

    def forward(self, x_TD: Tensor, layout: Layout, thrifty: bool = False) -> Tensor:
        before, after = (self.region(plain, thrifty) for plain in (_before, _after))
        out: Tensor = after(self, x_TD, self.attn(before(self, x_TD), layout))
        return out


def _before(block: Block, x_TD: Tensor) -> Tensor:
    return F.linear(block.ln_1(x_TD), block.attn.in_proj_weight, block.attn.in_proj_bias)


def _after(block: Block, x_TD: Tensor, attended_TD: Tensor) -> Tensor:
    x_TD = x_TD + block.attn.out_proj(attended_TD)
    out: Tensor = x_TD + block.mlp(block.ln_2(x_TD))
    return out


@functools.cache
def _graph(region: Callable[..., Tensor], thrifty: bool) -> Callable[..., Tensor]:
    """`region`, compiled at its first calls. More kinds of calls than the limit raise an error."""
    torch._dynamo.config.optimize_ddp = False  # it would cut these graphs at DDP's buckets; they end within them
    return torch.compile(_thrifty(region) if thrifty else region, dynamic=True, fullgraph=True)


def _thrifty(region: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def kept(*inputs: Any) -> Any:
        return checkpoint(region, *inputs, use_reentrant=False, context_fn=_keep_products)

    return kept


def compile_blocks(model: nn.Module) -> None:
    """Compiles what the stacks in `model` repeat, at their first calls."""
    for module in model.modules():
        if isinstance(module, Repeated):
            module.compiled = True


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
        thrifty = self.remember == "products"
        for block in self.resblocks:
            if self.remember == "all" or not torch.is_grad_enabled() or (thrifty and block.compiled):
                x_TD = block(x_TD, layout, thrifty)
            else:
                keep = _keep_products if thrifty else noop_context_fn
                x_TD = checkpoint(block, x_TD, layout, use_reentrant=False, context_fn=keep)
        return x_TD


def _keep_products() -> Any:
    """Selective checkpointing: results of matrix products stay, all else is computed again."""
    aten = torch.ops.aten
    return create_selective_checkpoint_contexts([aten.mm.default, aten.addmm.default])
