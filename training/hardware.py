"""The hardware: its peak (MFU is a fraction of it), what it can, the memory in use, and the same sums every time.

Peaks are the vendors' dense figures for tensor cores in 16 bit (half of them in TF32). On anything else MFU is null: a
CPU has no figure that means anything.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from pairs.errors import PairmillError
from pairs.pretrain import PretrainSpec

log = logging.getLogger("pairmill.training")

PEAK_16_BIT = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}  # FLOP/s


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device, None where they aren't known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next(
        (peak for part, peak in PEAK_16_BIT.items() if part in name.split()[-1] or f" {part} " in f" {name} "), None
    )


def memory_bytes(device: torch.device) -> int:
    """The most that was allocated on a GPU so far, or what this process holds now."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """torch's deterministic kernels in the block, if `wanted`; an operation that has none raises there."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, at the first product
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def precision(spec: PretrainSpec, device: torch.device) -> torch.dtype:
    """The dtype of matrix products. `auto`: bfloat16 where the hardware multiplies it, float32 elsewhere; logged."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported()
    else:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        able = any(flag in flags for flag in ("avx512_bf16", "amx_bf16"))
    if spec.precision == "bf16" and not able:
        raise PairmillError(
            expected="hardware that multiplies bfloat16 (precision: bf16)",
            found=f"none on this {device.type}",
            remedy="set precision: auto or fp32",
        )
    dtype = torch.bfloat16 if spec.precision != "fp32" and able else torch.float32
    log.info("precision: %s on %s", dtype, device.type)
    return dtype


def check_gpus(workers: int) -> None:
    """Raises PairmillError where there are GPUs, but fewer than workers."""
    if torch.cuda.is_available() and workers > torch.cuda.device_count():
        raise PairmillError(
            expected=f"a GPU for each worker (pretrain.workers), {workers} or more",
            found=str(torch.cuda.device_count()),
            remedy="set workers to the number of GPUs, or hide them all (CUDA_VISIBLE_DEVICES=) to train on the CPU",
        )
