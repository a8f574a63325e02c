"""Checkpoints: whole or absent, verified, the earlier one when the later is damaged."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pairs.errors import PairmillError
from training import checkpoint

FACTS = {"plan": "p", "epoch": 0}


def _pair(width: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
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


def test_the_last_two_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, *_pair(), FACTS | {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_one_is_passed_over_with_a_message(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, *_pair(), FACTS | {"step": step})
    path = tmp_path / "step-00000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    {"flip": lambda: path.write_bytes(data), "cut": lambda: path.write_bytes(data[:9]), "delete": path.unlink}[damage]()
    with caplog.at_level(logging.WARNING, "pairmill.training"):
        found = checkpoint.latest(tmp_path)
    assert found and found[0].name == "step-00000001" and "step-00000002 is passed over" in caplog.text


def test_nothing_half_written_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, *_pair(), FACTS | {"step": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(PairmillError, match="No space left"):
        checkpoint.save(tmp_path, *_pair(), FACTS | {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    (tmp_path / ".tmp-left-by-a-kill").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found and found[1]["step"] == 1 and len(list(tmp_path.iterdir())) == 1


FULL = """
import resource, sys
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
whole = export.build(MODEL, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # the weights fit, the moments don't
try:
    if what == "checkpoint":
        checkpoint.save(folder, model, optimizer, {"step": 1})
    else:
        export.save(folder / "model", MODEL, whole.state_dict(), {})
except PairmillError as error:
    print(error.found, list(folder.iterdir()))
"""


@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_a_disk_without_room_is_told_and_leaves_nothing(tmp_path: Path, what: str) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path), what], capture_output=True, text=True)
    assert done.stdout.startswith("File too large; nothing was published") and done.stdout.endswith("[]\n"), done.stderr


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, *_pair(3), FACTS | {"step": 1})
    with pytest.raises(PairmillError, match="architecture"):
        checkpoint.restore(path, *_pair(4))
