"""Whole runs in processes of their own: two ranks, a kill, a resume with the same pairs and losses, and an end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from tests.training.small import config
from training import launch
from training.config import TrainConfig

pytestmark = pytest.mark.timeout(600)


def _metrics(cfg: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(cfg.out_dir) / "metrics.jsonl").read_text().splitlines()]


class Stop(Exception):
    pass


@pytest.mark.slow
def test_two_ranks_killed_and_resumed_equal_an_unbroken_run(tmp_path: Path) -> None:
    whole, broken = (config(tmp_path, name, workers=2) for name in ("whole", "broken"))
    seen: list[int] = []
    result = launch.train(whole, lambda line: seen.append(line["step"]))
    assert seen == list(range(8)) and result.steps == 8 and result.resumed_from == 0 and result.fill == 1.0

    def stop(line: dict[str, Any]) -> None:
        if (Path(broken.out_dir) / "checkpoints" / "step-00000003").exists():  # by step 6, before the next is begun
            raise Stop

    with pytest.raises(Stop):
        launch.train(broken, stop)
    again = launch.train(broken)
    assert again.resumed_from in (3, 6)
    for a, b in zip(_metrics(whole), _metrics(broken), strict=True):
        assert [a[k] for k in ("step", "loss", "uids_sha256", "grad_norm")] == [
            b[k] for k in ("step", "loss", "uids_sha256", "grad_norm")
        ]
    assert content_hash(Path(result.model)) == content_hash(Path(again.model))  # nothing tells them apart
    assert launch.train(broken) == again  # done: returns at once

    one = config(tmp_path, "one", workers=1)
    launch.train(one)
    for a, b in zip(_metrics(whole), _metrics(one), strict=True):
        assert a["uids_sha256"] == b["uids_sha256"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_a_message_and_no_process_stays(tmp_path: Path) -> None:
    cfg = config(tmp_path, "dies", workers=2, steps=5000)

    def kill(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            os.kill(_children()[-1], signal.SIGKILL)

    with pytest.raises(PairmillError, match=r"rank [01] of the training"):
        launch.train(cfg, kill)
    assert not _children()


def _children() -> list[int]:
    """Training processes of this one."""
    own = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and b"training.run" in command and fields[0] != "Z":
            own.append(int(path.parent.name))
    return sorted(own)


@pytest.mark.slow
def test_errors_of_a_rank_arrive_as_advice(tmp_path: Path) -> None:
    cfg = config(tmp_path, "bad", steps=2)
    missing = cfg.model_copy(update={"shards": [cfg.shards[0].model_copy(update={"index": 7})]})
    began = time.perf_counter()
    with pytest.raises(PairmillError, match=r"00007\.parquet"):
        launch.train(missing)
    assert time.perf_counter() - began < 120 and not (Path(cfg.out_dir) / "model").exists()


def test_a_process_that_ends_without_a_result_is_an_error_not_a_wait(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "print('loading', end='')"], stdout=subprocess.PIPE)
    (tmp_path / "rank0.log").write_text("--- this rank starts\nall went well\n")
    with pytest.raises(PairmillError, match="exit code 0: all went well"):
        list(launch._lines([process], tmp_path))
