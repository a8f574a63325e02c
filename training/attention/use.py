"""What decides whether a backend can run: nothing of it needs a tensor, so that a run is checked before it starts."""

import importlib.util
from typing import NamedTuple

import torch


class Use(NamedTuple):
    """A call of attention. `kind` is `Layout.kind`, `width` that of a head, `grad` whether a backward follows."""

    device: str
    dtype: torch.dtype
    kind: str = "full"
    width: int = 64
    grad: bool = True


def triton_limit(use: Use) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton isn't installed"
    if use.device != "cuda" and not (use.device == "cpu" and interpreted()):
        return f"triton compiles for CUDA, the tensors are on {use.device}, and TRITON_INTERPRET=1 isn't set"
    if use.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"triton takes float32, float16 or bfloat16, and this is {use.dtype}"
    if use.dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter computes bfloat16 products wrongly: use float16 or float32 there"
    if use.width % 16 or not 16 <= use.width <= 128:
        return f"triton takes heads of 16 to 128, a multiple of 16, and this one is {use.width} wide"
    return None


def interpreted() -> bool:
    import triton as package

    return bool(package.knobs.runtime.interpret)
