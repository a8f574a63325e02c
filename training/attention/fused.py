"""Backend `triton`: our own fused attention for the lengths of this job, captions of 10 to 40 tokens and images of 16
to 1,024 patches, where a tile of 128 rows computes mostly nothing. `schedule` says which tiles, `kernels` how.

Memory: the output and two float32 a token and head for the backward. Runs on CUDA, or on a CPU in Triton's interpreter
(TRITON_INTERPRET=1 before Triton is first imported), where its bfloat16 products are wrong and therefore refused.
"""

import math
from typing import Any

import torch
from torch import Tensor

from training.attention import kernels
from training.attention.layout import Layout
from training.attention.schedule import TILES, schedule

STEP = TILES[-1]  # columns of a step through a long segment


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[1], len(q), dtype=torch.float32, device=q.device)
        plan = schedule(layout)
        shapes = [(part, _shape(q, rows) | {"C": rows}) for rows, part in plan.short.items()]
        shapes += [(part, _shape(q, rows, long=True)) for rows, part in plan.queries.items()]
        for part, shape in shapes:
            kernels.forward[len(part), q.shape[1]](
                q, k, v, o, lse, *layout.bounds(), part, *_sizes(q), *_strides(q, k, v, o), **shape
            )
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.layout = layout
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, o, lse = ctx.saved_tensors
        do = do if do.stride(2) == 1 else do.contiguous()
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        plan, bounds, sizes, heads = schedule(ctx.layout), ctx.layout.bounds(), _sizes(q), q.shape[1]
        for rows, part in plan.short.items():
            kernels.backward_short[len(part), heads](
                q, k, v, do, dq, dk, dv, lse, *bounds, part, *sizes, *_strides(q, k, v, do, dq), **_shape(q, rows)
            )
        delta = torch.empty_like(lse) if plan.queries else lse
        for rows, part in plan.queries.items():
            kernels.backward_queries[len(part), heads](
                q, k, v, o, do, dq, lse, delta, *bounds, part, *sizes, *_strides(q, k, v, o, do, dq),
                **_shape(q, rows, long=True),
            )  # fmt: skip
        for rows, part in plan.keys.items():
            kernels.backward_keys[len(part), heads](
                q, k, v, do, dk, dv, lse, delta, *bounds, part, *sizes, *_strides(q, k, v, do, dq),
                **_shape(q, rows, long=True),
            )  # fmt: skip
        return dq, dk, dv, None


@torch.compiler.disable
def triton(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    out: Tensor = _Fused.apply(q_TNH, k_TNH, v_TNH, layout)
    return out


def _sizes(q: Tensor) -> tuple[int, float]:
    """Tokens, and the factor that brings scores into units of log2."""
    return len(q), q.shape[2] ** -0.5 * math.log2(math.e)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _shape(q: Tensor, rows: int, long: bool = False) -> dict[str, int]:
    """Compile-time sizes of a kernel that takes a whole tile at once, or goes through a long segment in steps."""
    even, full = 1 << (q.shape[2] - 1).bit_length(), q.dtype == torch.float32
    # One warp for 16 rows of a short tile; long tiles spill registers with fewer than four.
    warps = (4 if long else rows // 16) * (2 if even > 64 else 1)
    # Two stages of 64 columns in float32 exceed the shared memory of an H200 where a head is 128 wide.
    steps = {"C": STEP // 2 if full else STEP} if long else {}
    return {"H": q.shape[2], "E": even, "R": rows, "num_warps": warps, "num_stages": 1 if full else 2, **steps}
