"""What every attention backend must do, wherever it runs: equal the oracle, and let no document feel another."""

from typing import NamedTuple

import torch

from training.attention import Layout, attend

LOOSE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Case(NamedTuple):
    """Arguments of `Layout.of`."""

    lengths: list[int]
    causal: bool = False
    prefix: int | list[int] = 0
    keys: list[int] | None = None


EDGES = [
    Case([15, 16, 17, 31, 33], True),
    Case([1, 127]),
    Case([128, 129], True, [70, 3]),
    Case([1] * 9 + [3, 64, 65]),
    Case([20, 70, 5], keys=[197, 3, 9]),
    Case([10, 40, 12], True, [4, 30, 12]),
]


def inputs(layout: Layout, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> list[torch.Tensor]:
    """q, k and v as strided views of one projection where there is one stream, and what the output is weighed with."""
    make = torch.Generator().manual_seed(seed)
    sizes = (layout.tokens, layout.keys, layout.keys, layout.tokens)
    q, k, v, toward = (torch.randn(n, 2, width, generator=make).to(device, dtype) for n in sizes)
    if layout.kind != "cross":
        q, k, v = torch.stack([q, k, v], 1).unbind(1)
    return [q, k, v, toward]


def outcome(tensors: list[torch.Tensor], layout: Layout, backend: str) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    *qkv, toward = tensors
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attend(*qkv, layout, backend)
    assert out.dtype == qkv[0].dtype
    return [out.detach(), *torch.autograd.grad((out * toward.to(out.dtype)).sum(), qkv)]


def equals_the_oracle(case: Case, backend: str, dtype: torch.dtype, width: int, device: str = "cpu") -> None:
    layout = Layout.of(*case).to(torch.device(device))
    tensors = inputs(layout, width, dtype, device)
    found = outcome(tensors, layout, backend)
    # Against exact inputs: the oracle computes in float32 whatever the dtype, and its gradients aren't rounded twice.
    wide = [x.double() if dtype == torch.float64 else x.float() for x in tensors]
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, outcome(wide, layout, "reference"), strict=True):
        close = LOOSE[dtype] * max(1.0, float(b.abs().max()))
        torch.testing.assert_close(a.to(b.dtype), b, rtol=LOOSE[dtype], atol=close, msg=lambda m, n=name: f"{n}: {m}")


def documents_feel_no_other(
    case: Case, changed: int, backend: str, dtype: torch.dtype, width: int, device: str = "cpu"
) -> None:
    """Changes one document: all others' outputs and gradients stay as they are, bit for bit; its own don't."""
    layout = Layout.of(*case).to(torch.device(device))
    tensors = inputs(layout, width, dtype, device)
    before = outcome(tensors, layout, backend)
    other = [x.clone() for x in tensors]
    spans = []
    for x, lengths in zip(other, (case.lengths, *[case.keys or case.lengths] * 2, case.lengths), strict=True):
        start = sum(lengths[:changed])
        spans.append(slice(start, start + lengths[changed]))
        x[spans[-1]] = x[spans[-1]] * -3 + 2.5
    after = outcome(other, layout, backend)
    for a, b, span in zip(before, after, (spans[0], *spans[:3]), strict=True):
        rest = torch.ones(len(a), dtype=torch.bool, device=a.device)
        rest[span] = False
        assert torch.equal(a[rest], b[rest])
        # A single token's weight is 1 whatever its key is: no gradient reaches q and k.
        assert not torch.equal(a[span], b[span]) or float(a[span].abs().max()) < 1e-2
