"""Backend `flex`: torch's flex_attention, compiled, with the layout's bounds as its mask.

The block mask says which 128 × 128 blocks hold anything and which are full; it is built from lengths on the host, once
per layout, without the dense tokens × tokens mask that `create_block_mask` evaluates. Shapes are dynamic, so another
number of tokens doesn't recompile. arXiv 2412.05496.
"""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.attention.layout import Layout, host_bounds
from training.attention.use import Use

BLOCK = 128


def flex(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_TNH, v_TNH))
    out: Tensor = _compiled()(q, k, v, block_mask=layout.recalled("flex", block_mask))
    return out[0].transpose(0, 1)


def flex_limit(use: Use) -> str | None:
    if use.device not in ("cuda", "cpu"):
        return f"flex runs on CUDA and CPU, and the tensors are on {use.device}"
    if use.device == "cpu" and use.grad:
        return "flex has no backward pass on a CPU: call it under torch.no_grad(), or use sdpa"
    if use.device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "flex compiles for the CPU with g++ or clang++, and neither is installed"
    if use.device == "cuda" and use.width < 16:
        return f"flex takes heads of at least 16 on CUDA, and this one is {use.width} wide"
    if use.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"flex takes float32, float16 or bfloat16, and this is {use.dtype}"
    return None


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def block_mask(layout: Layout) -> Any:
    """Torch's BlockMask of a layout, on the layout's device."""
    from torch.nn.attention.flex_attention import BlockMask

    low, high = layout.recalled("host_bounds", host_bounds)
    rows = -(-layout.tokens // BLOCK)
    # Rows past the end see nothing: they neither widen what a block sees nor make it full.
    spare = (0, rows * BLOCK - layout.tokens)
    pad = torch.nn.functional.pad
    first = pad(low, spare, value=layout.keys).view(rows, BLOCK).amin(1)[:, None]
    end = pad(high, spare, value=0).view(rows, BLOCK).amax(1)[:, None]
    last_low = pad(low, spare, value=layout.keys).view(rows, BLOCK).amax(1)[:, None]
    first_high = pad(high, spare, value=0).view(rows, BLOCK).amin(1)[:, None]
    left = torch.arange(0, layout.keys, BLOCK)[None]
    some = (first < left + BLOCK) & (end > left)
    full = (last_low <= left) & (first_high >= left + BLOCK)
    device = layout.cu_seqlens.device
    lows, highs = layout.bounds()

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k >= lows[q]) & (k < highs[q])

    return BlockMask.from_kv_blocks(
        *_listed((some & ~full).to(device)), *_listed(full.to(device)), BLOCK, seen, (layout.tokens, layout.keys)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of blocks has, and their numbers first; (1, 1, rows) and (1, 1, rows, columns)."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    count = blocks.sum(1, dtype=torch.int32)
    return count[None, None], order.int()[None, None]
