"""One rank in this process: what it resumes from, what it tells, and when it stops."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pairs.store import Store
from pairs.workspace import Workspace
from tests.training.small import config, pair
from training.config import TrainConfig, TrainResult
from training.run import train_rank

torch.set_num_threads(1)


def _train(cfg: TrainConfig) -> TrainResult:
    return train_rank(cfg, 0, 1, torch.device("cpu"))


def _metrics(cfg: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(cfg.out_dir) / "metrics.jsonl").read_text().splitlines()]


def test_checkpoints_of_another_plan_are_given_up_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path, "run", steps=4)
    first = _train(cfg)
    Workspace(Store(tmp_path)).bury("uid", [pair(0)[0]["uid"]], "asked")
    with caplog.at_level(logging.WARNING, "pairmill.training"):
        again = _train(cfg)
    assert "begins anew" in caplog.text and again.resumed_from == 0 and len(_metrics(cfg)) == 4
    assert again.pairs == first.pairs - 1 and again.left_out == {"forgotten": 1}
    folders = sorted(path.name for path in (Path(cfg.out_dir) / "checkpoints").iterdir())
    assert folders == ["step-00000003", "step-00000004"] and Store(tmp_path).has("runs/run/result.json")
