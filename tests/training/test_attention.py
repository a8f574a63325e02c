"""Every backend against the oracle, forward and backward, over ragged shapes; no document feels another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairs.errors import PairmillError
from tests.training.attention_cases import EDGES, Case, documents_feel_no_other, equals_the_oracle, inputs
from training.attention import Layout, attend, chosen, flex, unsupported

torch.set_num_threads(1)
RAGGED = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def _qkv(tokens: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 2, 4, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@given(RAGGED, st.booleans(), st.integers(0, 5))
def test_sdpa_equals_the_oracle(lengths: list[int], causal: bool, prefix: int) -> None:
    equals_the_oracle(Case(lengths, causal, prefix if causal else 0), "sdpa", torch.float64, 4)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_sdpa_equals_the_oracle_across(pairs: list[tuple[int, int]]) -> None:
    equals_the_oracle(Case([q for q, _ in pairs], keys=[k for _, k in pairs]), "sdpa", torch.float64, 4)


def test_the_oracle_equals_one_softmax_written_by_hand() -> None:
    q, k, v = _qkv(3, 5)
    out = attend(q, k, v, Layout.of([1, 2], causal=True), "reference")
    torch.testing.assert_close(out[0], v[0])  # one token sees itself
    torch.testing.assert_close(out[1], v[1])  # the first of a causal pair too
    scores = torch.stack([(q[2] * k[1]).sum(-1), (q[2] * k[2]).sum(-1)]) / 2.0
    weights = scores.softmax(0)[..., None]
    torch.testing.assert_close(out[2], weights[0] * v[1] + weights[1] * v[2])


def test_the_oracle_of_a_prefix_and_across_is_one_masked_softmax() -> None:
    q, k, v = _qkv(7, 6)
    prefixed, across = Layout.of([4, 3], True, [3, 0]), Layout.of([2, 5], keys=[6, 1])
    assert (prefixed.kind, across.kind) == ("prefix", "cross")
    seen = [
        (prefixed, ["1110...", "1110...", "1110...", "1111...", "....100", "....110", "....111"]),
        (across, ["111111."] * 2 + ["......1"] * 5),
    ]
    for layout, rows in seen:
        mask = torch.tensor([[cell == "1" for cell in row] for row in rows])
        scores = torch.einsum("qnh,knh->nqk", q, k) / 2.0
        expected = torch.einsum("nqk,knh->qnh", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)
        torch.testing.assert_close(attend(q, k, v, layout, "reference"), expected)
        assert layout.visible == int(mask.sum())


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(
    "case", [Case([3, 3, 1, 5]), Case([3, 3, 1, 5], True), Case([3, 3, 5], True, 2), Case([3, 4], keys=[2, 5])]
)
def test_a_document_feels_no_other(backend: str, case: Case) -> None:
    documents_feel_no_other(case, 1, backend, torch.float32, 4)


def test_runs_join_equal_neighbours_only() -> None:
    layout = Layout.of([2, 2, 5, 2])
    assert [run[:2] for run in layout.runs] == [(2, 2), (1, 5), (1, 2)]
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


@pytest.mark.parametrize("case", [*EDGES, Case([300, 20, 200])])
def test_the_mask_of_flex_is_the_layout_s(case: Case) -> None:
    layout = Layout.of(*case)
    mask, (low, high) = flex.block_mask(layout), layout.bounds()
    k = torch.arange(layout.keys)[None]
    seen = (k >= low[:, None]) & (k < high[:, None])
    found = torch.stack([mask.mask_mod(0, 0, torch.tensor(q), k[0]) for q in range(layout.tokens)])
    assert torch.equal(found, seen)
    padded = torch.nn.functional.pad(seen, (0, -layout.keys % 128, 0, -layout.tokens % 128))
    blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    some, full = blocks.any(3).any(1), blocks.all(3).all(1)
    listed = mask.to_dense()[0, 0].bool()
    assert bool((listed | ~some).all())  # no block that holds anything is left out
    filled = torch.zeros_like(full)
    for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        filled[row, mask.full_kv_indices[0, 0, row, :count].long()] = True
    assert torch.equal(filled, full)


def test_flex_uncompiled_equals_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(flex, "_compiled", lambda: flex_attention)
    for case in EDGES:
        layout = Layout.of(*case)
        *qkv, _ = inputs(layout, 16, torch.float32, "cpu")
        torch.testing.assert_close(
            attend(*qkv, layout, "flex"), attend(*qkv, layout, "reference"), rtol=1e-5, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_flex_compiled_equals_the_oracle() -> None:
    reason = unsupported("flex", "cpu", torch.float32, grad=False)
    if reason:
        pytest.skip(reason)
    for case in (EDGES[1], EDGES[2]):
        layout = Layout.of(*case)
        *qkv, _ = inputs(layout, 32, torch.float32, "cpu")
        torch.testing.assert_close(
            attend(*qkv, layout, "flex"), attend(*qkv, layout, "reference"), rtol=1e-5, atol=1e-5
        )


def test_backends_say_why_they_cannot_run() -> None:
    assert "float32" in (unsupported("varlen", "cuda", torch.float32) or "")
    assert "prefix" in (unsupported("varlen", "cuda", torch.bfloat16, "prefix") or "")
    assert "no backward pass" in (unsupported("flex", "cpu", torch.float32) or "")
    assert "CUDA" in (unsupported("flash_attn", "cpu", torch.float32) or "")
    assert unsupported("sdpa", "cpu", torch.float32) is None
    assert chosen("auto", "cuda", torch.bfloat16, "prefix") == "sdpa" and chosen("flex", "cpu", torch.half) == "flex"
