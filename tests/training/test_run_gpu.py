"""Trainings on a real GPU against the same on the CPU: `pytest -m gpu tests/training/test_run_gpu.py`. None has run on
one yet."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.small import config
from tests.training.test_blip_run import blip
from training.blip_run import train_blip_rank
from training.run import train_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def losses(out: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("objective", "precision"), [("clip", "fp32"), ("clip", "bf16"), ("blip", "fp32")])
def test_a_gpu_learns_what_a_cpu_learns(tmp_path: Path, objective: str, precision: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        name = f"{device}-{precision}"
        train = train_blip_rank if objective == "blip" else train_rank
        cfg = (blip if objective == "blip" else config)(tmp_path, name, precision=precision)
        train(cfg, 0, 1, torch.device(device))
        found[device] = losses(cfg.out_dir)
    tolerance = 2e-2 if precision == "bf16" else 1e-3
    assert found["cuda"] == pytest.approx(found["cpu"], rel=tolerance) and found["cuda"][-1] < found["cuda"][0]
