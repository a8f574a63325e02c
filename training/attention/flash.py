"""FlashAttention over `cu_seqlens`: torch's own (`varlen`) and the `flash_attn` package's. CUDA, 16 bit.

Torch picks cuDNN's kernel before FlashAttention's where both run; with FlashAttention-3 installed, or in deterministic
mode (cuDNN promises no order of its sums), FlashAttention's is asked for by name. arXiv 2205.14135, 2407.08608.
"""

import contextlib
import functools
import importlib.util
import inspect
import logging
from typing import Any

import torch
from torch import Tensor

from training.attention.layout import Layout
from training.attention.use import Use

log = logging.getLogger("pairmill.training")
HALVES = (torch.bfloat16, torch.float16)


def varlen(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    by_name = _third(q_TNH.device) or torch.are_deterministic_algorithms_enabled()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if by_name else contextlib.nullcontext():
        out: Tensor = varlen_attn(
            q_TNH, k_TNH, v_TNH, layout.cu_seqlens, layout.cu_seqlens_k, layout.max_length, layout.max_length_k,
            **(_causal() if layout.causal else {}),
        )  # fmt: skip
    return out


def flash_attn(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q_TNH, k_TNH, v_TNH, layout.cu_seqlens, layout.cu_seqlens_k, layout.max_length, layout.max_length_k,
        causal=layout.causal, deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return out


def varlen_limit(use: Use) -> str | None:
    found = importlib.util.find_spec("torch.nn.attention.varlen")
    return _limit("varlen", use) or (
        None if found else f"varlen needs torch 2.11 or newer, this is {torch.__version__}"
    )


def flash_attn_limit(use: Use) -> str | None:
    found = importlib.util.find_spec("flash_attn")
    return _limit("flash_attn", use) or (None if found else "the package flash_attn isn't installed")


def _limit(name: str, use: Use) -> str | None:
    if use.device != "cuda":
        return f"{name} has CUDA kernels only, and the tensors are on {use.device}"
    if use.dtype not in HALVES:
        return f"{name} takes bfloat16 or float16, and this is {use.dtype}: set precision: bf16"
    if use.kind == "prefix":
        return f"{name} knows causal and full masks, no prefix: use triton, flex or sdpa"
    if use.width % 8 or use.width > 256:
        return f"{name} takes heads of 8 to 256, a multiple of 8, and this one is {use.width} wide"
    return None


@functools.cache
def _causal() -> dict[str, Any]:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11's first form says is_causal, later ones window_size.
    named = "window_size" in inspect.signature(varlen_attn).parameters
    return {"window_size": (-1, 0)} if named else {"is_causal": True}


@functools.cache
def _third(device: torch.device) -> bool:
    """Whether FlashAttention-3 serves this GPU; switched on for the process at the first call."""
    import torch.nn.attention as ways

    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    if not (
        hopper and importlib.util.find_spec("flash_attn_interface") and hasattr(ways, "list_flash_attention_impls")
    ):
        return False
    if "FA3" not in ways.list_flash_attention_impls():
        return False
    ways.activate_flash_attention_impl("FA3")
    log.info("attention: FlashAttention-3 serves varlen on %s", torch.cuda.get_device_name(device))
    return True
