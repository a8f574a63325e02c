"""CapFilt as a recipe: rounds that pretrain a BLIP and fine-tune captioner and match filter from it."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.run import Run
from tests.pipelines import flow

MODEL = {**flow.MODEL, "image_px": 32, "patch_px": 8}
TRAIN = {"objective": "blip", "model": MODEL, "workers": 1, "batch_pairs": 8, "steps": 4, "warmup_steps": 1}
TRAIN |= {"precision": "fp32", "blip": {"queue": 32}}
TUNE = {"steps": 3, "warmup_steps": 1}


def recipe(root: Path) -> dict[str, Any]:
    """Two folders, so that nothing is fetched; `root` holds web/, trusted/ and eval/."""
    values = flow.recipe(root)
    values["sources"]["web"] = {"kind": "folder", "path": f"{root}/web"}
    values["filters"] = {"blip_caption": {"weights": "previous", "max_tokens": 12}, "blip_match": {"weights": "previous"}}
    values |= {"keep": [], "reducers": {}, "pretrain": TRAIN, "finetune": {"captioner": TUNE, "matcher": TUNE}}
    values |= {"first_filter": {"blip": flow.BLIP}, "rounds": 2, "name": "capfilt"}
    values["canaries"] = {"per_defect": 8, "max_fraction": 0.5, "defects": ["swapped_text"]}
    return values


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
def finished(drawn: Path) -> Run:
    return flow.run_stages(drawn / "recipe.yaml", drawn / "workspace")[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_rounds(finished: Run, drawn: Path) -> None:
    again, _ = flow.run_stages(drawn / "recipe.yaml", drawn / "workspace")
    stages = again.read("stages.json")
    assert {name for name in stages if name not in again.reused} == set()
