"""Attention over packed segments: `attend(q, k, v, layout)` never looks across a boundary and computes no padding.

`reference` is the oracle of all others; `sdpa` runs everywhere; `varlen` and `flash_attn` are FlashAttention; `flex` is
torch's compiled flex_attention; `triton` is our own kernel for short segments. Each says why it can't run; a named one
that can't is an error, and only `auto` chooses. Masks: full, causal, causal after a prefix, and cross-attention.

Legend: T tokens of all segments, K keys (T but in cross-attention), N heads, H width of a head.
"""

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from pairs.errors import PairmillError
from training.attention import flash, flex, plain
from training.attention.layout import Layout
from training.attention.use import Use, triton_limit

__all__ = ["BACKENDS", "Layout", "attend", "chosen", "unsupported"]
log = logging.getLogger("pairmill.training")


def _triton(q_TNH: Tensor, k_KNH: Tensor, v_KNH: Tensor, layout: Layout) -> Tensor:
    from training.attention import fused  # imports two compilers, which takes seconds

    return fused.triton(q_TNH, k_KNH, v_KNH, layout)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout], Tensor]] = {
    "reference": plain.reference,
    "sdpa": plain.sdpa,
    "varlen": flash.varlen,
    "flash_attn": flash.flash_attn,
    "flex": flex.flex,
    "triton": _triton,
}
_LIMITS: dict[str, Callable[[Use], str | None]] = {
    "reference": lambda use: None,
    "sdpa": lambda use: None,
    "varlen": flash.varlen_limit,
    "flash_attn": flash.flash_attn_limit,
    "flex": flex.flex_limit,
    "triton": triton_limit,
}


def attend(q_TNH: Tensor, k_KNH: Tensor, v_KNH: Tensor, layout: Layout, backend: str = "auto") -> Tensor:
    """Softmax attention within each segment, scaled by H^-0.5; (T, N, H), in `q`'s dtype.

    Raises PairmillError where a named backend can't run; `auto` takes the first that can, and logs which.
    """
    # A query past the last segment gives NaN gradients in some kernels, without a word.
    assert len(q_TNH) == layout.tokens and len(k_KNH) == len(v_KNH) == layout.keys, "tokens and layout disagree"
    given, dtype = q_TNH.dtype, _dtype(q_TNH)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_TNH, k_KNH, v_KNH))
    use = Use(q_TNH.device.type, dtype, layout.kind, q_TNH.shape[2], grad)
    name = _choose(use) if backend == "auto" else backend
    if name not in BACKENDS:
        raise PairmillError(
            expected=f"an attention backend among auto, {', '.join(BACKENDS)}", found=repr(name), remedy="name one"
        )
    reason = _limit(name, use)
    if reason:
        raise PairmillError(expected=f"attention backend {name!r} to run", found=reason, remedy="use attention: auto")
    if name not in ("reference", "sdpa"):  # those two see to precision themselves
        q_TNH, k_KNH, v_KNH = (x if x.dtype == dtype else x.to(dtype) for x in (q_TNH, k_KNH, v_KNH))
    return BACKENDS[name](q_TNH, k_KNH, v_KNH, layout).to(given)


def chosen(backend: str, device: str, dtype: torch.dtype, kind: str = "full") -> str:
    """The backend itself, or the one that `auto` stands for there; `kind` as in `Layout`."""
    return _choose(Use(device, dtype, kind)) if backend == "auto" else backend


def unsupported(
    name: str, device: str, dtype: torch.dtype, kind: str = "full", width: int = 64, grad: bool = True
) -> str | None:
    """Why the backend can't run there, or None where it can; `width` of a head, `grad`: whether a backward follows."""
    return _limit(name, Use(device, dtype, kind, width, grad))


@functools.cache
def _limit(name: str, use: Use) -> str | None:
    return _LIMITS[name](use)


@functools.cache
def _choose(use: Use) -> str:
    name = next(name for name in ("varlen", "sdpa") if _limit(name, use) is None)
    _tell(name, use.device, use.dtype)
    return name


@functools.cache
def _tell(name: str, device: str, dtype: torch.dtype) -> None:
    log.info("attention backend: %s for %s on %s", name, dtype, device)


def _dtype(q: Tensor) -> torch.dtype:
    """The dtype the kernel will see, autocast included."""
    kind = q.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and q.is_floating_point() else q.dtype
