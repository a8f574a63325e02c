"""Towers that are columns in a run: a recipe that can't end is told at once, another goes through to its report."""

from pathlib import Path
from typing import Any

import pytest

from pairs.errors import PairmillError
from pairs.pretrain import ModelSpec, PretrainSpec
from pipelines import stages, training_jobs
from pipelines.console import Console
from pipelines.run import open_run
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


def test_a_tokenizer_made_anew_in_its_folder_makes_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_jobs, "pins", lambda *_: [])
    monkeypatch.setattr(training_jobs, "_record", lambda run, name, config, *_: {"known": config.fingerprint})
    run = open_run(
        flow.write_recipe(tmp_path / "recipe.yaml", flow.recipe(tmp_path)), workspace=str(tmp_path / "space")
    )

    def known(tokenizer: str) -> str:
        spec = PretrainSpec(model=ModelSpec(tokenizer=tokenizer))
        return str(training_jobs.pretrain(run, "round-1", "", {}, spec, [])["known"])

    clip = known("clip")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words").mkdir()
    (tmp_path / "clip").mkdir()  # `clip` is open_clip's all the same
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    before = known(str(tmp_path / "words"))
    assert before == known(str(tmp_path / "words")) and clip == known("clip") != before
    (tmp_path / "words" / "tokenizer.json").write_text("{ }")
    assert known(str(tmp_path / "words")) != before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pretrain": {"towers": {"image": {"features": ["clip.cosines"]}}}}, r"towers\.image"),
        ({"pretrain": {"towers": {"text": {"features": ["blip_match.probability"]}}}}, r"towers\.text"),
        ({"pretrain": {"towers": {"image": {"features": ["clip.images"]}}}}, r"towers\.image"),
        ({"pretrain": {"towers": {"image": {"weights": "./nowhere"}}}}, "nowhere"),
        ({"first_filter": {"clip": {"towers": {"text": {"weights": "./nowhere"}}}}}, "nowhere"),
        ({"first_filter": {"clip": {"towers": HEADS}}}, "before any filter"),
        ({"pretrain": {"towers": HEADS}, "evaluate": {"retrieval": True}}, "retrieval: false"),
    ],
)
def test_towers_that_would_fail_later_are_told_at_once(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    for kind in ("trusted", "eval"):
        flow.draw_folder(tmp_path / kind, 1)
    values = flow.recipe(tmp_path) | {"evaluate": {"retrieval": False}}
    del values["sources"]["web"]
    changes = {"pretrain": {}} | changes | {"first_filter": values["first_filter"] | changes.get("first_filter", {})}
    path = flow.write_recipe(tmp_path / "recipe.yaml", values | changes)
    with pytest.raises(PairmillError, match=told):
        stages.check(open_run(path, workspace=str(tmp_path / "workspace"), console=Console(quiet=True)).recipe)
