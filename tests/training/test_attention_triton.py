"""The fused kernel: proven against the oracle in Triton's interpreter, compiled for GPUs without one, and its tiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.attention_cases import Case
from training.attention import Layout, schedule, unsupported

ROOT = Path(__file__).parents[2]
SIZES = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=12)


def _interpreted(marked: str) -> str:
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-m", marked, "tests/training/triton_cases.py", "--timeout=500"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.timeout(500)
def test_the_kernel_equals_the_oracle_in_the_interpreter() -> None:
    assert "10 passed" in _interpreted("not slow")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_kernel_equals_the_oracle_for_any_lengths() -> None:
    assert "5 passed" in _interpreted("slow")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="says what the compiler lacks")
def test_without_cuda_or_the_interpreter_it_says_so() -> None:
    assert "TRITON_INTERPRET=1 isn't set" in (unsupported("triton", "cpu", torch.float32) or "")


@given(SIZES, st.sampled_from(["full", "causal", "prefix", "cross"]))
def test_tiles_cover_each_token_once_and_all_it_sees(sizes: list[tuple[int, int]], kind: str) -> None:
    lengths, others = [q for q, _ in sizes], [k for _, k in sizes]
    prefix = others if kind == "prefix" else 0
    layout = Layout.of(*Case(lengths, kind in ("causal", "prefix"), prefix, others if kind == "cross" else None))
    plan, (low, high) = schedule.schedule(layout), layout.bounds()
    seen = torch.arange(layout.keys)[None] < high[:, None]
    seen &= torch.arange(layout.keys)[None] >= low[:, None]
    assert int(seen.sum()) == layout.visible <= plan.cells
    for groups, turned in (((plan.short, plan.queries), False), ((plan.short, plan.keys), True)):
        counted = torch.zeros_like(seen, dtype=torch.int32)
        written = torch.zeros(layout.keys if turned else layout.tokens, dtype=torch.int32)
        for long, rows, tile in (
            (i, rows, t) for i in (0, 1) for rows, part in groups[i].items() for t in part.tolist()
        ):
            q0, q1, k0, k1 = (*tile[2:], *tile[:2]) if long and turned else tile
            own = slice(k0, k1) if turned else slice(q0, q1)
            counted[q0:q1, k0:k1] += 1
            written[own] += 1
            assert own.stop - own.start <= rows
        assert bool((counted[seen] == 1).all()) and bool((written == 1).all())


def test_short_segments_share_tiles_and_long_ones_leave_little() -> None:
    tens = schedule.schedule(Layout.of([10] * 12))
    assert {rows: len(part) for rows, part in tens.short.items()} == {32: 4} and not tens.queries
    image = schedule.schedule(Layout.of([197]))
    assert {rows: len(part) for rows, part in image.queries.items()} == {64: 3, 16: 1}
    assert image.cells == 208 * 208  # tiles of 128 rows compute 256 * 256


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="nothing is compiled there")
@pytest.mark.parametrize("name", ["forward", "backward_short", "backward_queries", "backward_keys"])
def test_kernels_compile_for_hopper_in_bfloat16(name: str) -> None:
    """What the interpreter can't prove: a compiler accepts the kernels and gives 64 rows Hopper's products."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from training.attention import kernels

    kernel, numbers = getattr(kernels, name), {"H": 64, "E": 64, "R": 64, "C": 64}
    types = dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), "*bf16")
    types |= {"low": "*i32", "high": "*i32", "tiles": "*i32", "lse": "*fp32", "delta": "*fp32", "scale": "fp32"}
    signature = {x: "constexpr" if x in numbers else types.get(x, "i32") for x in kernel.arg_names}
    constants = {(kernel.arg_names.index(x),): value for x, value in numbers.items() if x in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, x in enumerate(kernel.arg_names)
        if x not in numbers and x not in ("tokens", "scale")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    assert "wgmma" in made.asm["ptx"] and made.metadata.shared < 100_000
