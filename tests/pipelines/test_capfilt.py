"""CapFilt as a recipe: rounds that pretrain a BLIP and fine-tune captioner and match filter from it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.run import Run
from tests.pipelines import flow
from training import blip_run, launch, run
from training.config import TrainConfig, TrainResult

TRAIN = flow.TRAIN | {"objective": "blip", "batch_pairs": 8, "steps": 4, "blip": {"queue": 32}}
del TRAIN["max_patches"]
TUNE = {"steps": 3, "warmup_steps": 1}


def recipe(root: Path) -> dict[str, Any]:
    """Two folders, so that nothing is fetched; `root` holds web/, trusted/ and eval/."""
    values = flow.recipe(root) | {"keep": [], "reducers": {}, "rounds": 2, "name": "capfilt"}
    values["sources"]["web"] = {"kind": "folder", "path": f"{root}/web"}
    previous = {"weights": "previous"}
    values["filters"] = {"blip_caption": previous | {"max_tokens": 12}, "blip_match": previous}
    values |= {"first_filter": {"blip": flow.BLIP}, "pretrain": TRAIN, "finetune": {"captioner": TUNE, "matcher": TUNE}}
    return values | {"canaries": {"per_defect": 8, "max_fraction": 0.5, "defects": ["swapped_text"]}}


def here(config: TrainConfig, on_line: launch.OnLine) -> TrainResult:
    """Trains in this process, which has imported transformers already."""
    return blip_run.train_blip_rank(config, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("capfilt")
    flow.draw_folder(root / "trusted", flow.TRUSTED)
    flow.draw_folder(root / "web", 24, 1000)
    for n, colour in enumerate(flow.COLOURS):
        flow.draw_folder(root / "eval" / colour, 1, 3000 + n)
    flow.write_recipe(root / "recipe.yaml", recipe(root))
    return root


@pytest.fixture(scope="module")
def finished(drawn: Path) -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "train", here)
        patch.setattr(run, "_say", lambda line: None)
        yield flow.run_stages(drawn / "recipe.yaml", drawn / "workspace")[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_rounds_and_a_second_run_that_reuses_them(finished: Run, drawn: Path) -> None:
    again, _ = flow.run_stages(drawn / "recipe.yaml", drawn / "workspace")
    assert {name for name in again.read("stages.json") if name not in again.reused} == {
        "report",
        "round-1/gates",
        "round-2/gates",
        "crawl",
        "fetch",
        "first-filter",
    }
