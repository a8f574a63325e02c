"""The fused kernel in Triton's interpreter: run by test_attention_triton.py in a process of its own, since Triton reads
TRITON_INTERPRET when it is imported."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairs.errors import PairmillError
from tests.training.attention_cases import EDGES, Case, documents_feel_no_other, equals_the_oracle
from training.attention import Layout, attend, unsupported

torch.set_num_threads(1)
LENGTHS = st.lists(st.sampled_from([1, 2, 5, 10, 15, 16, 17, 23, 31, 32, 33, 40, 64, 65, 80]), min_size=1, max_size=6)


@pytest.mark.parametrize("case", EDGES)
def test_edges_of_tiles(case: Case) -> None:
    equals_the_oracle(case, "triton", torch.float32, 16)


def test_float16() -> None:
    equals_the_oracle(EDGES[3], "triton", torch.float16, 32)


@pytest.mark.slow
@pytest.mark.parametrize("width", [48, 80, 128])
def test_widths_of_heads(width: int) -> None:
    equals_the_oracle(Case([7, 40, 66], True), "triton", torch.float32, width)


@pytest.mark.parametrize("case", [Case([5, 9, 2, 67, 10, 30], True), Case([9, 4, 3, 8], keys=[5, 70, 2, 66])])
def test_documents_feel_no_other(case: Case) -> None:
    documents_feel_no_other(case, 1, "triton", torch.float32, 16)


def test_bfloat16_is_refused() -> None:
    q = torch.zeros(4, 1, 16, dtype=torch.bfloat16)
    with pytest.raises(PairmillError, match="bfloat16 products wrongly"):
        attend(q, q, q, Layout.of([4]), "triton")
    assert unsupported("triton", "cpu", torch.float32) is None
    assert "multiple of 16" in (unsupported("triton", "cpu", torch.float32, width=24) or "")


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("EXAMPLES", "15")))
@given(LENGTHS, st.booleans(), st.sampled_from([0, 1, 3, 20, 70]), st.sampled_from([torch.float32, torch.float16]))
def test_any_lengths(lengths: list[int], causal: bool, prefix: int, dtype: torch.dtype) -> None:
    equals_the_oracle(Case(lengths, causal, prefix if causal else 0), "triton", dtype, 16)


@pytest.mark.slow
@settings(max_examples=int(os.environ.get("EXAMPLES", "15")))
@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 130)), min_size=1, max_size=4))
def test_any_lengths_across(pairs: list[tuple[int, int]]) -> None:
    equals_the_oracle(Case([q for q, _ in pairs], keys=[k for _, k in pairs]), "triton", torch.float32, 16)
