"""Every backend on a real GPU: `pytest -m gpu tests/training/test_attention_gpu.py`."""

import pytest
import torch

from tests.training.attention_cases import EDGES, Case, documents_feel_no_other, equals_the_oracle
from training.attention import BACKENDS, Layout, unsupported

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),  # the first call of a kernel compiles it
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CASES = [*EDGES, Case([1, 7, 7, 33, 64, 197, 577, 1025]), Case([10, 23, 31, 40] * 16, True)]
HEADS = [(torch.bfloat16, 64), (torch.bfloat16, 80), (torch.bfloat16, 128), (torch.float16, 32), (torch.float32, 64)]
FAST = [name for name in BACKENDS if name != "reference"]


def _possible(backend: str, cases: list[Case], dtype: torch.dtype, width: int) -> list[Case]:
    """The cases that the backend takes; skips where it takes none."""
    reasons = [unsupported(backend, "cuda", dtype, Layout.of(*case).kind, width) for case in cases]
    if all(reasons):
        pytest.skip(str(reasons[0]))
    return [case for case, reason in zip(cases, reasons, strict=True) if reason is None]


@pytest.mark.parametrize(("dtype", "width"), HEADS)
@pytest.mark.parametrize("backend", FAST)
def test_equals_the_oracle(backend: str, dtype: torch.dtype, width: int) -> None:
    for case in _possible(backend, CASES, dtype, width):
        equals_the_oracle(case, backend, dtype, width, "cuda")


@pytest.mark.parametrize("backend", FAST)
def test_documents_feel_no_other(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [Case([3, 9, 2, 197, 10, 30], True), Case([64, 65, 40, 12]), EDGES[2], EDGES[4]]
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        for case in _possible(backend, cases, torch.bfloat16, 64):
            documents_feel_no_other(case, 1, backend, torch.bfloat16, 64, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
