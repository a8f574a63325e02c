"""One rank in this process: what it resumes from, what it tells, and when it stops."""

import contextlib
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.pretrain import BlipSpec, ModelSpec, PretrainSpec, TowerSpec
from pairs.store import Store
from pairs.strict import strict
from pairs.workspace import Workspace
from tests.training.small import SPEC, config, pair
from training import checkpoint, frame, hardware, launch, loop
from training import config as training_config
from training.config import BlipJob, TrainConfig, TrainResult, identity
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


class Stop(Exception):
    pass


def _damage(cfg: TrainConfig, pairs: int) -> None:
    """Zeroes the images of the first `pairs` pairs."""
    store = Store(cfg.store)
    for pin in cfg.shards:
        tar = bytearray(store.read(pin.ref.tar))
        for row in store.read_table(pin.ref.table).to_pylist()[:pairs]:
            tar[row["image_offset"] : row["image_offset"] + row["image_size"]] = bytes(row["image_size"])
            pairs -= 1
        store.write(pin.ref.tar, bytes(tar))


def test_a_run_that_is_killed_ends_in_the_same_model_and_tells_the_same_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, twice, broken = (config(tmp_path, name, checkpoint_every=every) for name, every in NAMES.items())
    _damage(whole, 9)
    results = [_train(whole), _train(twice)]

    def stop(line: dict[str, Any]) -> None:
        if line.get("step") == 4:
            raise Stop

    monkeypatch.setattr(frame, "say", stop)
    with pytest.raises(Stop):
        _train(broken)
    monkeypatch.setattr(frame, "say", lambda line: None)
    results += [_train(broken), _train(broken)]
    assert [result.resumed_from for result in results] == [0, 0, 3, 8]
    assert len({content_hash(Path(result.model)) for result in results}) == 1
    for name in ("damaged", "skipped", "loss", "fill"):
        assert len({getattr(result, name) for result in results}) == 1, name
    assert results[0].damaged >= 9 and results[0].loss is not None


NAMES = {"whole": 3, "twice": 5, "broken": 3}


def test_damage_in_most_pairs_stops_the_run(tmp_path: Path) -> None:
    cfg = config(tmp_path, "half", steps=40)
    _damage(cfg, 35)
    with pytest.raises(PairmillError, match=r"\d+ of 160 undecodable in the 10 steps up to 9"):
        _train(cfg)
    _damage(cfg, 60)
    with pytest.raises(PairmillError, match="16 of 16 undecodable in the 1 steps up to 0"):
        _train(cfg.model_copy(update={"out_dir": str(tmp_path / "none")}))


def test_pairs_without_features_are_not_told_as_damaged_images() -> None:
    steps = [(1, 12, 16)] * loop.PATIENCE
    with pytest.raises(PairmillError, match=r"10 of 160 undecodable and 120 of 160 no_features") as told:
        loop._check_damage(9, 30, steps)
    assert "columns" in told.value.expected and "verify" not in told.value.remedy
    loop._check_damage(9, 30, [(1, 7, 16)] * loop.PATIENCE)
    loop._check_damage(3, 3, [(1, 12, 16)])


class Streams:
    """Stands for `torch.cuda`: notes the order in which work is given to the device."""

    def __init__(self, seen: list[str]) -> None:
        self.seen, self.Event, self.copies = seen, object, 0

    def Stream(self, device: torch.device) -> "Streams":
        return self

    def current_stream(self, device: torch.device) -> "Streams":
        return self

    def stream(self, side: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def wait_stream(self, other: Any) -> None:
        self.seen.append("wait for steps")

    def record_event(self) -> int:
        self.copies += 1
        return self.copies

    def wait_event(self, event: int) -> None:
        self.seen.append(f"wait for copy {event}")


def test_a_gpu_copies_a_batch_while_it_computes_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(loop.torch, "cuda", Streams(seen))
    batches = (SimpleNamespace(to=lambda device, n=n: seen.append(f"copy {n}") or n) for n in (1, 2, 3))
    for number in loop._on_device(batches, torch.device("cuda")):  # type: ignore[arg-type]
        seen.append(f"step {number}")
    first, later = ["wait for steps", "copy 1"], ["wait for steps", "copy 2", "wait for copy 1", "step 1"]
    assert seen[:6] == first + later and [x for x in seen if "step " in x] == ["step 1", "step 2", "step 3"]
    assert seen.index("copy 3") < seen.index("step 2") and seen[-2:] == ["wait for copy 3", "step 3"]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    frame.Metrics(tmp_path / "metrics.jsonl", 0).add({"step": 0, "loss": float("nan"), "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 0, "loss": None, "lr": 0.5}


TOWER = {"layers": 1, "width": 16, "heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (TowerSpec, TOWER | {"heads": 3}, "16 is not a multiple of its 3 heads"),
        (ModelSpec, {"image_px": 60}, "60 is not a multiple of patch_px 8"),
        (BlipSpec, {"patch_px": 7}, "64 is not a multiple of patch_px 7"),
        (PretrainSpec, {"workers": 4, "batch_pairs": 3}, "without a pair"),
        (PretrainSpec, {"attention": "flash"}, "'varlen'"),
    ],
)
def test_mistakes_are_told_with_the_recipe(kind: type, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(PairmillError, match=told):
        strict(kind, settings, "recipe.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU lacks")
def test_preflight_tells_what_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    launch.preflight(SPEC)
    with pytest.raises(PairmillError, match="varlen has CUDA kernels only"):
        launch.preflight(SPEC.model_copy(update={"attention": "varlen"}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(PairmillError, match="3 or more"):
        hardware.check_gpus(3)


def test_lines_of_libraries_are_no_lines_of_ours(tmp_path: Path) -> None:
    code = "print('Downloading...'); print(); print('{\"step\": 1}')"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert next(launch._lines([process], tmp_path)) == {"step": 1}
    process.wait()


def test_a_rank_that_dies_silently_is_not_given_an_earlier_try_s_last_words(tmp_path: Path) -> None:
    (tmp_path / "rank0.log").write_text(f"{launch.START}\nan old complaint\n{launch.START}\n")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], stdout=subprocess.PIPE)
    with pytest.raises(PairmillError, match="exit code 3: no message"):
        next(launch._lines([process], tmp_path))
    process.wait()


def test_a_new_version_of_a_training_is_another_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = config(tmp_path, "run")
    blip = BlipJob(store="", shards=clip.shards, spec=BlipSpec(), out_dir="")
    before = clip.fingerprint, blip.fingerprint
    monkeypatch.setattr(training_config, "VERSION", 99)
    monkeypatch.setattr(training_config, "BLIP_VERSION", 99)
    assert clip.fingerprint != before[0] and blip.fingerprint != before[1]


def test_a_checkpoint_of_a_later_step_of_another_run_is_removed(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (300, 400, 100, 200):
        checkpoint.save(tmp_path, model, optimizer, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00000200"]


def test_tensorboard_and_a_trace_where_they_are_wanted(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = config(tmp_path, "told", tensorboard=True, profile_steps=1, steps=8)
    assert cfg.fingerprint == config(tmp_path, "told").fingerprint
    _train(cfg)
    board = EventAccumulator(str(Path(cfg.out_dir) / "tensorboard")).Reload()
    lines = _metrics(cfg)
    losses = [event.value for event in board.Scalars("loss")]
    assert losses == pytest.approx([line["loss"] for line in lines]) and len(losses) == 8
    assert all(line["flops_per_s"] > 1e6 and line["mfu"] is None and line["memory_mb"] > 50 for line in lines)
    trace = json.loads((Path(cfg.out_dir) / "trace.json").read_text())
    assert any("addmm" in event.get("name", "") for event in trace["traceEvents"])


def test_a_full_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(PairmillError, match="free for checkpoints"):
        _train(config(tmp_path, "full"))


def test_what_a_training_starts_from_is_not_the_folder_it_is_called_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("some file")
    job = TrainConfig(store=str(tmp_path), shards=[], spec=SPEC, out_dir="")
    assert identity(job).keys() == {"config"}
