"""Checkpoints: whole or absent, verified, the earlier one when the later is damaged; written while training goes on."""

import json
import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pairs.errors import PairmillError
from training import checkpoint

FACTS = {"plan": "p", "epoch": 0}
Pair = tuple[torch.nn.Module, torch.optim.Optimizer]


def _pair(width: int = 3) -> Pair:
    torch.manual_seed(width)
    model = torch.nn.Linear(width, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.ones(1, 3)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses


def _save(folder: Path, step: int, **facts: object) -> None:
    saver = checkpoint.Saver(folder, keep_best="loss" in facts)
    saver.save(*_pair(), FACTS | {"step": step} | facts)
    saver.wait()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    model, optimizer = _pair()
    _train(model, optimizer, 3)
    checkpoint.save(tmp_path, model, optimizer, FACTS | {"step": 3})
    expected = _train(model, optimizer, 4)
    other, its_optimizer = _pair()
    found = checkpoint.latest(tmp_path)
    assert found and found[1] == FACTS | {"step": 3}
    checkpoint.restore(found[0], other, its_optimizer)
    assert _train(other, its_optimizer, 4) == expected


def test_a_save_holds_the_moment_it_was_begun_while_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may, plain = threading.Event(), checkpoint._rename
    monkeypatch.setattr(checkpoint, "_rename", lambda *paths: (may.wait(30), plain(*paths)))
    model, optimizer = _pair()
    _train(model, optimizer, 3)
    saver = checkpoint.Saver(tmp_path)
    saver.save(model, optimizer, FACTS | {"step": 3})
    expected = _train(model, optimizer, 4)
    saver.check()
    assert checkpoint._folders(tmp_path) == []  # the file system is slow, training is not
    may.set()
    saver.wait()
    other, its_optimizer = _pair()
    checkpoint.restore(tmp_path / "step-00000003", other, its_optimizer)
    assert _train(other, its_optimizer, 4) == expected


def test_the_last_two_stay_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path / "last", step)
    assert _names(tmp_path / "last") == ["step-00000002", "step-00000003"]
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 1.5]):
        _save(tmp_path / "best", step, loss=loss)
    assert _names(tmp_path / "best") == ["step-00000001", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_one_is_passed_over_with_a_message(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        _save(tmp_path, step)
    path = tmp_path / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {"flip": lambda: path.write_bytes(data), "cut": lambda: path.write_bytes(data[:9]), "delete": path.unlink}[damage]()
    with caplog.at_level(logging.WARNING, "pairmill.training"):
        found = checkpoint.latest(tmp_path)
    assert found and found[0].name == "step-00000001" and "step-00000002 is passed over" in caplog.text


def test_one_of_the_earlier_format_is_passed_over_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {"facts": FACTS, "sha256": {}}
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "state.json").write_text(json.dumps(state | {"seal": checkpoint.fingerprint(state)}))
    with caplog.at_level(logging.WARNING, "pairmill.training"):
        assert checkpoint.latest(tmp_path) is None and "an earlier format" in caplog.text


def test_nothing_half_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save", full)
    with pytest.raises(PairmillError, match="No space left"):
        checkpoint.save(tmp_path, *_pair(), FACTS | {"step": 2})
    assert _names(tmp_path) == ["step-00000001"]
    (tmp_path / ".tmp-step-00000002").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found and found[1]["step"] == 1 and _names(tmp_path) == ["step-00000001"]


FULL = """
import resource, sys, time
from pathlib import Path
import torch
from pairs.errors import PairmillError
from training import checkpoint, export
from tests.training.small import MODEL
folder, what = Path(sys.argv[1]), sys.argv[2]
model = torch.nn.Linear(200, 200)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 200)).sum().backward()
optimizer.step()
whole, saver = export.build(MODEL, 0), checkpoint.Saver(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # the weights fit, the moments don't
try:
    if what == "model":
        export.save(folder / "model", MODEL, whole.state_dict(), {})
    else:
        saver.save(model, optimizer, {"step": 1})
        while what == "noticed":  # while the loop goes on
            time.sleep(0.01)
            saver.check()
        saver.save(model, optimizer, {"step": 2})
except PairmillError as error:
    print(error.found, list(folder.iterdir()))
"""


@pytest.mark.parametrize("what", ["noticed", "waited for", "model"])
def test_a_disk_without_room_is_told_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), what], capture_output=True, text=True)
    assert done.stdout.startswith("File too large; nothing was published") and done.stdout.endswith("[]\n"), done.stderr


KILLED = """
import sys, time
from pathlib import Path
import torch
from training import checkpoint
model = torch.nn.Linear(3, 2)
optimizer, saver = torch.optim.AdamW(model.parameters()), checkpoint.Saver(Path(sys.argv[1]))
saver.save(model, optimizer, {"step": 1})
saver.wait()
checkpoint._rename = lambda temporary, target: (print("written", flush=True), time.sleep(60))
saver.save(model, optimizer, {"step": 2})
saver.wait()
"""


def test_a_kill_amid_a_save_leaves_the_last_one(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stdout.readline() == "written\n"
        running.send_signal(signal.SIGKILL)
    assert _names(tmp_path) == [".tmp-step-00000002", "step-00000001"]
    found = checkpoint.latest(tmp_path)
    assert found and found[1]["step"] == 1 and _names(tmp_path) == ["step-00000001"]


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, *_pair(3), FACTS | {"step": 1})
    with pytest.raises(PairmillError, match="architecture"):
        checkpoint.restore(path, *_pair(4))
    deeper = torch.nn.Sequential(_pair()[0], _pair()[0])
    with pytest.raises(PairmillError, match="24 tensors that only one of the two has"):
        checkpoint.restore(path, deeper, torch.optim.AdamW(deeper.parameters()))


def test_room_is_asked_for_what_does_not_lie_there_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 numbers with two moments, 96 bytes: three at the start, one where two are published."""
    free = SimpleNamespace(free=100)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: free)
    model, _ = _pair()
    with pytest.raises(PairmillError, match="free for checkpoints"):
        checkpoint.check_room(tmp_path, model, False)
    for step in (1, 2):
        _save(tmp_path / "checkpoints", step)
    checkpoint.check_room(tmp_path, model, False)
    free.free = 90
    with pytest.raises(PairmillError, match="free for checkpoints"):
        checkpoint.check_room(tmp_path, model, False)


def test_files_that_another_rank_wrote_elsewhere_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = checkpoint._Writer.finish

    def finish(writer: checkpoint._Writer, metadata: Any, results: Any) -> None:
        next(Path(writer.path).glob("*.safetensors")).unlink()
        publish(writer, metadata, results)

    monkeypatch.setattr(checkpoint._Writer, "finish", finish)
    with pytest.raises(PairmillError, match="one shared folder"):
        _save(tmp_path, 1)
    assert checkpoint.latest(tmp_path) is None
