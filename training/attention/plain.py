"""Backends in plain PyTorch: `reference`, the oracle of all others, and `sdpa`, which runs everywhere.

`reference` is one softmax per segment in float32 (float64 for float64). `sdpa` takes neighbouring segments of equal
length in one call without copying; packing sorts segments by length, so a batch is a few runs (padding near lengths to
one took 1.1 to 3.7 times as long on a CPU). On a CPU its kernel runs in float32 even under autocast: its 16-bit
backward was three times slower.

Legend: T tokens of all segments, N heads, H width of a head, S segments.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from training.attention.layout import Layout, Run


def reference(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    wide = torch.float64 if q_TNH.dtype == torch.float64 else torch.float32
    outs, start, start_k = [], 0, 0
    with torch.autocast(q_TNH.device.type, enabled=False):
        for run in layout.segments():
            q = q_TNH[start : start + run.length].to(wide).transpose(0, 1)
            k, v = (x[start_k : start_k + run.keys].to(wide).transpose(0, 1) for x in (k_TNH, v_TNH))
            scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(~_seen(run, q.device), -torch.inf)
            outs.append((scores.softmax(-1) @ v).transpose(0, 1))
            start, start_k = start + run.length, start_k + run.keys
    return torch.cat(outs)


def sdpa(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    on_cpu = q_TNH.device.type == "cpu"
    if on_cpu and q_TNH.dtype in (torch.bfloat16, torch.float16):
        q_TNH, k_TNH, v_TNH = q_TNH.float(), k_TNH.float(), v_TNH.float()
    outs = []
    with torch.autocast(q_TNH.device.type, enabled=torch.is_autocast_enabled(q_TNH.device.type) and not on_cpu):
        # One split rather than a slice per run: its backward is one concatenation, not a sum of padded slices.
        q_parts = q_TNH.split([run.times * run.length for run in layout.runs])
        k_parts, v_parts = (x.split([run.times * run.keys for run in layout.runs]) for x in (k_TNH, v_TNH))
        for run, q, k, v in zip(layout.runs, q_parts, k_parts, v_parts, strict=True):
            q, k, v = (x.unflatten(0, (run.times, -1)).transpose(1, 2) for x in (q, k, v))
            causal = layout.causal and run.prefix <= 1
            mask = _seen(run, q.device) if layout.causal and 1 < run.prefix < run.keys else None
            out_SNLH = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
            outs.append(out_SNLH.transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _seen(run: Run, device: torch.device) -> Tensor:
    """(length, keys): whether a query sees a key."""
    q, k = torch.arange(run.length, device=device), torch.arange(run.keys, device=device)
    return k < (q + 1).clamp(min=run.prefix)[:, None]
