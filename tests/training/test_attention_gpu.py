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
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FAST = [name for name in BACKENDS if name != "reference"]


def _or_skip(backend: str, case: Case, dtype: torch.dtype, width: int) -> None:
    reason = unsupported(backend, "cuda", dtype, Layout.of(*case).kind, width)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("width", [32, 64, 80, 128])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", FAST)
def test_equals_the_oracle(backend: str, case: Case, dtype: torch.dtype, width: int) -> None:
    _or_skip(backend, case, dtype, width)
    equals_the_oracle(case, backend, dtype, width, "cuda")


@pytest.mark.parametrize("case", [Case([3, 9, 2, 197, 10, 30], True), Case([64, 65, 40, 12]), EDGES[4]])
@pytest.mark.parametrize("backend", FAST)
def test_documents_feel_no_other(backend: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    _or_skip(backend, case, torch.bfloat16, 64)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        documents_feel_no_other(case, 1, backend, torch.bfloat16, 64, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
