"""Attention over packed segments: `attend(q, k, v, layout)` never looks across a boundary and computes no padding.

Three backends. `reference` is one softmax per segment in float32 (float64 for float64): the oracle.
`sdpa` takes neighbouring segments of equal length in one call without copying; packing sorts segments by
length, so a batch is a few runs. `varlen` is torch's FlashAttention over `cu_seqlens` (CUDA, 16 bit).
On a CPU, sdpa's kernel runs in float32 even under autocast: its 16-bit backward was three times slower.

Legend: T tokens of all segments, N heads, H width of a head, S segments. FlashAttention: arXiv 2205.14135.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pairs.errors import PairmillError

log = logging.getLogger("pairmill.training")


@dataclass(frozen=True)
class Layout:
    """Where segments lie among T tokens. `runs` are (segments, length) of equal neighbours, on the host."""

    cu_seqlens: Tensor  # int32, (S + 1,), from 0 to T
    max_length: int
    causal: bool
    runs: tuple[tuple[int, int], ...]

    @staticmethod
    def of(lengths: Sequence[int], causal: bool = False) -> "Layout":
        """The layout of segments of these `lengths`, each at least 1, one after another."""
        assert lengths and min(lengths) >= 1, "a segment holds at least one token: some kernels crash on none"
        # Lengths [2, 2, 5] are the runs [(2, 2), (1, 5)].
        runs = tuple((len(list(group)), length) for length, group in itertools.groupby(lengths))
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return Layout(ends, max(lengths), causal, runs)

    def to(self, device: torch.device) -> "Layout":
        return Layout(self.cu_seqlens.to(device, non_blocking=True), self.max_length, self.causal, self.runs)


def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout, backend: str = "auto") -> Tensor:
    """Softmax attention within each segment, scaled by H^-0.5; (T, N, H), in `q`'s dtype.

    Raises PairmillError where a named backend can't run; `auto` takes the first that can, and logs which.
    """
    name = chosen(backend, q_TNH.device.type, _dtype(q_TNH))
    if name not in BACKENDS:
        raise PairmillError(
            expected=f"an attention backend among auto, {', '.join(BACKENDS)}", found=repr(name), remedy="name one"
        )
    reason = unsupported(name, q_TNH.device.type, _dtype(q_TNH))
    if reason:
        raise PairmillError(expected=f"attention backend {name!r} to run", found=reason, remedy="use attention: auto")
    return BACKENDS[name](q_TNH, k_TNH, v_TNH, layout).to(q_TNH.dtype)


def chosen(backend: str, device: str, dtype: torch.dtype) -> str:
    """The backend itself, or the one that `auto` stands for there."""
    return _choose(device, dtype) if backend == "auto" else backend


@functools.cache
def unsupported(name: str, device: str, dtype: torch.dtype) -> str | None:
    """Why the backend can't run there, or None where it can."""
    return _LIMITS[name](device, dtype)


@functools.cache
def _choose(device: str, dtype: torch.dtype) -> str:
    name = next(name for name in ("varlen", "sdpa") if unsupported(name, device, dtype) is None)
    log.info("attention backend: %s for %s on %s", name, dtype, device)
    return name


def _dtype(q: Tensor) -> torch.dtype:
    """The dtype the kernel will see, autocast included."""
    kind = q.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) and q.is_floating_point() else q.dtype


def _reference(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    wide = torch.float64 if q_TNH.dtype == torch.float64 else torch.float32
    outs = []
    with torch.autocast(q_TNH.device.type, enabled=False):
        for start, end in itertools.pairwise(layout.cu_seqlens.tolist()):
            q, k, v = (x[start:end].to(wide).transpose(0, 1) for x in (q_TNH, k_TNH, v_TNH))
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
            if layout.causal:
                future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(future, -torch.inf)
            outs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs)


def _sdpa(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    on_cpu = q_TNH.device.type == "cpu"
    if on_cpu and q_TNH.dtype in (torch.bfloat16, torch.float16):
        q_TNH, k_TNH, v_TNH = q_TNH.float(), k_TNH.float(), v_TNH.float()
    outs = []
    with torch.autocast(q_TNH.device.type, enabled=torch.is_autocast_enabled(q_TNH.device.type) and not on_cpu):
        sizes = [count * length for count, length in layout.runs]
        # One split rather than a slice per run: its backward is one concatenation, not a sum of padded slices.
        parts = zip(*(x.split(sizes) for x in (q_TNH, k_TNH, v_TNH)), strict=True)
        for (count, length), qkv in zip(layout.runs, parts, strict=True):
            q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in qkv)
            out_SNLH = F.scaled_dot_product_attention(q, k, v, is_causal=layout.causal)
            outs.append(out_SNLH.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _varlen(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11's first form says is_causal, later ones window_size.
    named = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if named else {"is_causal": True}
    cu, longest = layout.cu_seqlens, layout.max_length
    dtype = _dtype(q_TNH)
    q, k, v = (x.to(dtype) for x in (q_TNH, k_TNH, v_TNH))
    out: Tensor = varlen_attn(q, k, v, cu, cu, longest, longest, **(causal if layout.causal else {}))
    return out


def _varlen_limit(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return f"varlen has CUDA kernels only, and the tensors are on {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"varlen takes bfloat16 or float16, and this is {dtype}: set precision: bf16"
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"varlen needs torch 2.11 or newer, and this is {torch.__version__}"
    return None


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Layout], Tensor]] = {
    "reference": _reference,
    "sdpa": _sdpa,
    "varlen": _varlen,
}
_LIMITS: dict[str, Callable[[str, torch.dtype], str | None]] = {
    "reference": lambda device, dtype: None,
    "sdpa": lambda device, dtype: None,
    "varlen": _varlen_limit,
}
