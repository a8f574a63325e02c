"""The stages in their order: what they make, what a second run reuses, and what a moved threshold makes anew."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster.guard import Guard
from filters.engine import SCORING, plan
from filters.score_tables import errors_of
from pairs.errors import PairmillError
from pairs.recipe import GatesSpec, Recipe
from pairs.shard import list_shards
from pipelines import curation, evaluation, promotion, stages
from pipelines.console import Console
from pipelines.fetch.ledger import FetchCounts
from pipelines.run import Run, open_run
from tests.filters.shards import write_shards
from tests.filters.test_crashes import Fragile
from tests.pipelines import flow
from tests.pipelines.conftest import Finished

pytestmark = pytest.mark.timeout(400)
LASTING = ("candidates", "pairs", "scores", "selections", "shards", "canaries", "models")
ROUND = ["round-1/curate", "round-1/pretrain", "round-1/evaluate", "round-1/promote"]
WORKED = ["crawl", "fetch", "first-filter", *ROUND]


def changed(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe as it would be read with other values."""
    return Recipe.model_validate(recipe.model_dump(by_alias=True) | values)


def test_every_stage_is_done_and_says_what_it_did(finished: Finished) -> None:
    told = finished.run.read("stages.json")
    assert set(told) == {*WORKED, "round-1/gates", "report"}
    assert {facts["state"] for facts in told.values()} == {"done"}
    assert told["crawl"]["note"] == f"web {flow.WEB + len(flow.TEXTS)} candidates, trusted {flow.TRUSTED} candidates"
    assert finished.run.reused == [], "a first run has nothing to reuse"
    order = sorted(WORKED, key=lambda name: told[name]["started"])
    assert order == WORKED


def test_the_run_is_pinned_to_its_increments_and_its_code(finished: Finished) -> None:
    lineage = finished.run.read("lineage.json")
    assert lineage["increments"] == {"web": ["0000"], "trusted": ["0000"]}
    assert lineage["made_by"]["version"] and lineage["recipe"]["name"] == "tiny"
    assert all(ref.group.endswith(lineage["fetch"]) for refs in stages.shards(finished.run).values() for ref in refs)


def test_the_first_filter_scores_round_one(finished: Finished) -> None:
    scorer = finished.run.read("round-1/curation.json")["scorer"]
    assert set(scorer["models"]) == {"clip", "beginning", "captioner", "matcher"}
    models = {path.name for path in (finished.workspace / "models").iterdir()}
    assert set(scorer["models"].values()) <= models
    assert len([name for name in models if len(name) == 64]) == 5, "four of the first filter, one of the round"


def test_no_canary_reaches_training(finished: Finished) -> None:
    store = finished.run.workspace.store
    planted = {u for ref in list_shards(store, "canaries") for u in store.read_table(ref.table)["uid"].to_pylist()}
    trained = {u for ref in list_shards(store, "shards") for u in store.read_table(ref.table)["uid"].to_pylist()}
    assert planted and trained and not planted & trained


def test_figures_are_shares_beside_what_chance_reaches(finished: Finished) -> None:
    rows = finished.run.read("round-1/evaluation.json")
    assert {row["model"] for row in rows} == {"first filter", "round 1"}
    assert {"zero-shot accuracy", "image to text at 1"} <= {row["figure"] for row in rows}
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 and 0 < row["chance"] <= 1 for row in rows)


def test_a_second_run_reuses_everything(finished: Finished, tmp_path: Path) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    before = flow.files_below(space, *LASTING)
    run, told = flow.run_stages(finished.recipe, space)
    assert run.reused == WORKED
    assert flow.files_below(space, *LASTING) == before and len(before) > 20
    assert told["run"] == finished.run.folder


def test_a_moved_threshold_scores_nothing_again(finished: Finished, tmp_path: Path) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    values = flow.recipe(finished.root)
    values["keep"][1]["min"] = 7
    before = flow.files_below(space, *LASTING)
    run = open_run(
        flow.write_recipe(tmp_path / "recipe.yaml", values), workspace=str(space), console=Console(quiet=True)
    )
    assert run.folder != finished.run.folder
    with run.workspace.lock():
        stages.crawl(run)
        stages.fetch(run)
        picked = stages.curate(run, 1, stages.first_filter(run))
    assert run.reused == ["crawl", "fetch", "first-filter"]
    after = flow.files_below(space, *LASTING)
    new = {path for path in after if path not in before}
    assert {path: after[path] for path in before} == before, "published files never change"
    assert {path.split("/")[0] for path in new} == {"selections", "shards"}
    assert picked["kept"] < finished.run.read("round-1/curation.json")["kept"]


@pytest.mark.parametrize(
    ("gates", "told"),
    [(GatesSpec(min_pairs=1000), "gates.min_pairs"), (GatesSpec(min_canary_recall=1.0), "gates.min_canary_recall")],
)
def test_a_failed_gate_stops_and_is_recorded(finished: Finished, tmp_path: Path, gates: GatesSpec, told: str) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    run = open_run(finished.recipe, workspace=str(space), console=Console(quiet=True))
    picked = run.read("round-1/curation.json")
    stages.gates(run, 1, picked)
    strict: Run = dataclasses.replace(run, recipe=changed(run.recipe, gates=gates.model_dump()))
    with pytest.raises(PairmillError, match=told) as error:
        stages.gates(strict, 1, picked)
    assert error.value.remedy
    assert run.read("stages.json")["round-1/gates"]["state"] == "failed"


def test_a_poor_fetch_stops_the_run(finished: Finished, tmp_path: Path) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    run = open_run(finished.recipe, workspace=str(space), console=Console(quiet=True))
    strict = dataclasses.replace(run, recipe=changed(run.recipe, gates={"min_fetch_success": 0.99}))
    with pytest.raises(PairmillError, match=r"gates\.min_fetch_success") as error:
        stages.fetch(strict)
    assert error.value.found == f"{(flow.WEB + 6) / (flow.WEB + 8):.1%} of {flow.WEB + 8}"
    assert "ledger/web" in error.value.remedy


def counted(candidates: int, ok: int, refused: int = 0) -> FetchCounts:
    lost = {"permanent/http_404": candidates - ok - refused, "refused/robots": refused}
    return FetchCounts(candidates, ok, 1, 0, lost)


@pytest.mark.parametrize(
    ("fetched", "found"),
    [
        ([counted(10, 0)], "0.0% of 10"),
        ([counted(90, 90), counted(10, 0)], None),
        ([counted(5, 0, refused=5)], "nothing asked for: all 5"),
        ([counted(100, 90), counted(5, 0, refused=5)], None),
        ([], None),
    ],
)
def test_the_fetch_gate_asks_of_all_increments_together(
    tmp_path: Path, fetched: list[FetchCounts], found: str | None
) -> None:
    values = flow.recipe(tmp_path) | {"gates": {"min_fetch_success": 0.8}}
    path = flow.write_recipe(tmp_path / "recipe.yaml", values)
    run = open_run(path, workspace=str(tmp_path / "workspace"), console=Console(quiet=True))
    if found is None:
        stages._success_gate(run, "web", fetched)
    else:
        with pytest.raises(PairmillError, match=r"gates\.min_fetch_success") as error:
            stages._success_gate(run, "web", fetched)
        assert error.value.found.startswith(found)


@pytest.mark.parametrize("recalls", [{}, {"swapped_text": 0.9, "near_duplicate": None}])
def test_a_missing_canary_figure_fails_its_gate(tmp_path: Path, recalls: dict[str, float | None]) -> None:
    figures = {defect: {"value": recall, "n": 9} for defect, recall in recalls.items()}
    picked = {"kept": 40, "kept_untrusted": 4, "selection": "selections/tiny", "canary_recall": figures}
    for gates, stops in (({}, False), ({"min_canary_recall": 0.5}, True), ({"min_pairs": 5}, True)):
        path = flow.write_recipe(tmp_path / "recipe.yaml", flow.recipe(tmp_path) | {"gates": gates})
        run = open_run(path, workspace=str(tmp_path / "workspace"), console=Console(quiet=True))
        if not stops:
            stages.gates(run, 1, picked)
        else:
            with pytest.raises(PairmillError, match=r"no .*canaries|beside the trusted"):
                stages.gates(run, 1, picked)


def test_an_evaluation_is_done_again_once_a_held_out_pair_is_forgotten(finished: Finished, tmp_path: Path) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    run = open_run(finished.recipe, workspace=str(space), console=Console(quiet=True))
    known, model = {"trusted": stages.shards(run)["trusted"]}, finished.report["rounds"][0]["training"]["model"]
    before = evaluation.evaluate(run, "it", {"clip": model}, known)
    assert before["reused"]
    (_, gone), *left = evaluation.held_out_rows(run, known)
    run.workspace.bury("uid", [gone["uid"]], "asked for")
    after = evaluation.evaluate(run, "it", {"clip": model}, known)
    assert not after["reused"] and len(left) > 1
    assert {row["n"] for row in after["rows"] if row["figure"].startswith("image to text")} == {len(left)}


def test_without_reporting_canaries_the_scorer_stays(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "_figure", lambda *_: {"value": None, "n": 0})
    scorer, model = (
        finished.run.read("round-1/curation.json")["scorer"],
        finished.report["rounds"][0]["training"]["model"],
    )
    verdict = promotion.compare(finished.run, 1, scorer, {"clip": model})
    assert not verdict["promoted"] and "too few to tell" in verdict["told"]


def test_a_single_shard_that_kills_its_process_stops_no_run_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(curation, "NVIDIA", tmp_path / "none")
    monkeypatch.setattr(curation, "ray_session", lambda _: pytest.fail("one shard isn't worth a Ray"))
    path, alike = flow.write_recipe(tmp_path / "recipe.yaml", flow.recipe(tmp_path) | {"engine": "ray"}), []
    for name, dies in (("inline", False), ("ray", False), ("ray", True), ("inline", True)):
        place = str(tmp_path / f"{name}-{dies}")
        run = open_run(path, workspace=place, console=Console(quiet=True), engine=name)
        store, planned = run.workspace.store, plan({"fragile": Fragile(kills=("picture 5",) if dies else (), size=1)})
        refs = write_shards(store, (8,))
        if dies and name == "inline":
            store.write(refs[0].beside(SCORING).removesuffix(".parquet"), "")  # the mark of a death
        with contextlib.closing(run):
            assert [curation.score(run, planned, refs, "score") for _ in range(2)] == [1, 0]
            if name == "ray":
                assert not run.hold("guard", Guard()).ask(eval, "'torch' in __import__('sys').modules")
        alike.append(store.read(refs[0].beside(planned[0].folder)))
        assert errors_of(store.read_table(refs[0].beside(planned[0].folder)).schema) == (
            {"crashed: SIGSEGV": [5]} if dies else {}
        )
    assert alike[0] == alike[1] and alike[2] == alike[3] != alike[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_round_is_scored_by_the_model_of_the_first(finished: Finished, tmp_path: Path) -> None:
    space = flow.copied(finished.workspace, tmp_path / "workspace")
    values = flow.recipe(finished.root) | {"rounds": 2}
    run, told = flow.run_stages(flow.write_recipe(tmp_path / "recipe.yaml", values), space)
    assert set(WORKED) <= set(run.reused), "the first round is there already"
    first, second = (run.read(f"round-{n}/curation.json") for n in (1, 2))
    promoted = run.read("round-1/promotion.json")["promoted"]
    model = finished.report["rounds"][0]["training"]["model"]
    assert (second["scorer"]["models"]["clip"] == model) == promoted
    assert (second["scores"]["clip"] != first["scores"]["clip"]) == promoted
    assert second["scores"]["text_stats"] == first["scores"]["text_stats"]
    assert [row["round"] for row in told["rounds"]] == [1, 2]
