"""Every backend against the oracle, forward and backward, over ragged shapes; no document feels another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairs.errors import PairmillError
from training.attention import Layout, attend, unsupported

torch.set_num_threads(1)
RAGGED = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def _qkv(tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 2, 4, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@given(RAGGED, st.booleans())
def test_sdpa_equals_the_oracle(lengths: list[int], causal: bool) -> None:
    layout, outs = Layout.of(lengths, causal), []
    for backend in ("reference", "sdpa"):
        qkv = _qkv(sum(lengths), 3)
        out = attend(*qkv, layout, backend)
        out.mul(torch.arange(out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        outs.append([out, *(x.grad for x in qkv)])
    for expected, found in zip(*outs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_oracle_equals_one_softmax_written_by_hand() -> None:
    q, k, v = _qkv(3, 5)
    out = attend(q, k, v, Layout.of([1, 2], causal=True), "reference")
    torch.testing.assert_close(out[0], v[0])  # one token sees itself
    torch.testing.assert_close(out[1], v[1])  # the first of a causal pair too
    scores = torch.stack([(q[2] * k[1]).sum(-1), (q[2] * k[2]).sum(-1)]) / 2.0
    weights = scores.softmax(0)[..., None]
    torch.testing.assert_close(out[2], weights[0] * v[1] + weights[1] * v[2])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_document_feels_no_other(backend: str, causal: bool) -> None:
    layout = Layout.of([3, 3, 1, 5], causal)

    def outcome(noise: float) -> list[torch.Tensor]:
        qkv = _qkv(12, 7, torch.float32)
        with torch.no_grad():
            for x in qkv:
                x[3:6] += noise  # the second document alone
        out = attend(*qkv, layout, backend)
        out.square().sum().backward()
        rest = [i for i in range(12) if not 3 <= i < 6]
        return [out[rest], *(x.grad[rest] for x in qkv if x.grad is not None)]

    for before, after in zip(outcome(0.0), outcome(2.5), strict=True):
        assert torch.equal(before, after)


def test_runs_join_equal_neighbours_only() -> None:
    layout = Layout.of([2, 2, 5, 2])
    assert layout.runs == ((2, 2), (1, 5), (1, 2))
    assert layout.cu_seqlens.tolist() == [0, 2, 4, 9, 11] and layout.max_length == 5


def test_a_named_backend_that_cannot_run_is_an_error() -> None:
    q, k, v = _qkv(4, 1)
    with pytest.raises(PairmillError, match="CUDA"):
        attend(q, k, v, Layout.of([4]), "varlen")
    with pytest.raises(PairmillError, match="reference, sdpa, varlen"):
        attend(q, k, v, Layout.of([4]), "flash")


def test_half_precision_stays_near_the_oracle_under_autocast() -> None:
    layout = Layout.of([3, 3, 9])
    q, k, v = (x.detach().bfloat16() for x in _qkv(15, 2, torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v, layout, "sdpa")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(q, k, v, layout, "reference").float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen has CUDA kernels only")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("width", [32, 64])
def test_varlen_equals_the_oracle_and_lets_no_document_feel_another(causal: bool, width: int) -> None:
    lengths = [1, 7, 7, 33, 64]
    layout = Layout.of(lengths, causal).to(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(width)
    qkv = torch.randn(112, 3, 4, width, device="cuda", dtype=torch.bfloat16, generator=generator)
    toward = torch.randn(112, 4, width, device="cuda", dtype=torch.bfloat16, generator=generator)

    def outcome(backend: str, changed: slice | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        whole = qkv.clone()
        if changed:
            whole[changed] += 2.5
        whole.requires_grad_()
        q, k, v = whole.unbind(1)  # strided views, as one projection's output gives them
        assert not q.is_contiguous()
        out = attend(q, k, v, layout, backend)
        out.mul(toward).sum().backward()
        assert whole.grad is not None
        return out.detach(), whole.grad

    out, grad = outcome("varlen")
    expected, expected_grad = outcome("reference")
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(grad, expected_grad, rtol=4e-2, atol=4e-2)
    other, other_grad = outcome("varlen", slice(8, 15))  # the second document of 7
    rest = [i for i in range(112) if not 8 <= i < 15]
    torch.testing.assert_close(other[rest], out[rest], rtol=0, atol=0)
    torch.testing.assert_close(other_grad[rest], grad[rest], rtol=1e-2, atol=1e-2)  # its sums have no fixed order
    assert not torch.equal(other[8:15], out[8:15])


def test_varlen_says_why_it_cannot_run() -> None:
    assert "float32" in (unsupported("varlen", "cuda", torch.float32) or "")
    assert unsupported("sdpa", "cpu", torch.float32) is None
