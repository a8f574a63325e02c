"""Towers that are columns in a run: a recipe that can't end is told at once, another goes through to its report."""

from pathlib import Path

import pytest

from tests.pipelines import flow
from tests.pipelines.conftest import Finished

HEADS = {"image": {"features": ["clip.image"], "hidden": [8], "dropout": 0.1}, "text": {"features": ["clip.text"]}}


@pytest.mark.timeout(200)
def test_a_model_of_columns_is_trained_and_never_scores(finished: Finished, tmp_path: Path) -> None:
    space, values = flow.copied(finished.workspace, tmp_path / "workspace"), flow.recipe(finished.root)
    values["pretrain"] |= {"towers": HEADS}
    values |= {"texts": {"keep": "first"}, "evaluate": {"retrieval": False}}
    run, told = flow.run_stages(flow.write_recipe(tmp_path / "recipe.yaml", values), space)
    verdict, curated = run.read("round-1/promotion.json"), run.read("round-1/curation.json")
    assert not verdict["promoted"] and "takes columns" in verdict["told"]
    assert verdict["scorer"] == curated["scorer"]
    training = run.read("report.json")["rounds"][0]["training"]
    assert (space / "models" / training["model"] / "image_head.safetensors").exists()
    assert run.read("stages.json")["report"]["state"] == "done" and len(told["rounds"]) == 1
