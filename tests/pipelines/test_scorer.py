"""A run for what is new keeps the scorer in force, so that only what is new is scored; `advance` trains another."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pairs.errors import PairmillError
from pairs.workspace import Workspace
from pipelines import curation, scorer, stages, training_jobs
from pipelines.console import Console
from pipelines.run import Run, open_run
from tests.pipelines import flow
from tests.pipelines.conftest import Finished

pytestmark = pytest.mark.timeout(400)
QUIET = Console(quiet=True)
RESULT = {"name": "the model of round 1", "models": {"clip": "c" * 64, "captioner": "d" * 64, "matcher": "e" * 64}}

APART = ["a" * 32, "b" * 32]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return flow.write_recipe(tmp_path / "recipe.yaml", flow.recipe(tmp_path) | {"rounds": 3})


def opened(path: Path, **options: bool) -> Run:
    return open_run(path, workspace=str(path.parent / "workspace"), console=QUIET, **options)


def ended(path: Path, result: dict[str, object] = RESULT) -> Run:
    """A run that has ended with `result`, its models' folders beside it."""
    run = opened(path)
    assert scorer.settle(run) is None, "a first run trains its scorer"
    run.write("round-1/curation.json", {"apart": APART})
    run.write("round-2/promotion.json", {"told": "", "scorer": result})
    scorer.record(run)
    run.workspace.store.write(f"{run.folder}/report.html", "done")
    for name in RESULT["models"].values():  # type: ignore[union-attr, attr-defined]
        run.workspace.store.write(f"models/{name}/config.json", "{}")
    return run


def test_a_new_run_keeps_what_the_last_one_ended_with(path: Path) -> None:
    first = ended(path)
    run = opened(path, new=True)
    told = stages.first_filter(run)
    assert told["models"] == RESULT["models"] and told["name"] == f"the model of round 1, in force since {first.folder}"
    assert stages.rounds(run) == 1 and stages.rounds(first) == 3
    assert run.reused == ["first-filter"]
    assert stages.promote(run, 1, told, {"clip": "f" * 64}) == told
    assert "--advance" in run.read("round-1/promotion.json")["told"]
    assert scorer.settle(opened(path)) == told, "going on without --new decides nothing anew"
    scorer.record(run)
    run.workspace.store.write(f"{run.folder}/report.html", "done")
    third = opened(path, new=True)
    assert scorer.settle(third) == told, "the scorer in force is still the first run's"


def test_a_kept_scorer_is_asked_only_about_pairs_it_never_saw(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(curation.canaries, "make_canaries", lambda *given: asked.append(given[5]) or [])
    curation.plant(ended(path), {})
    run = opened(path, new=True)
    stages.first_filter(run)
    curation.plant(run, {})
    assert asked == [None, APART]


def test_a_run_that_advances_trains_its_scorer(path: Path) -> None:
    ended(path)
    run = opened(path, new=True, advance=True)
    assert scorer.settle(run) is None and stages.rounds(run) == 3
    assert scorer.settle(opened(path, new=True)) is None, "it was settled"


def test_a_scorer_that_lacks_a_role_is_told(path: Path) -> None:
    ended(path, RESULT | {"models": {"clip": "c" * 64}})
    with pytest.raises(PairmillError, match="a captioner and a matcher") as error:
        scorer.settle(opened(path, new=True))
    assert "--advance" in error.value.remedy


def test_a_run_that_ends_early_leaves_what_scored_it(path: Path) -> None:
    run = opened(path)
    scorer.record(run)
    assert not run.workspace.store.has("scorer/tiny.json"), "nothing was scored"
    run.write("round-1/curation.json", {"scorer": RESULT})
    scorer.record(run)
    run.workspace.store.write(f"{run.folder}/report.html", "done")
    for name in RESULT["models"].values():  # type: ignore[attr-defined]
        run.workspace.store.write(f"models/{name}/config.json", "{}")
    kept = scorer.settle(opened(path, new=True))
    assert kept and kept["models"] == RESULT["models"]


@pytest.fixture
def drawn_later(finished: Finished) -> Iterator[None]:
    """Six more pictures in the trusted folder while the test lasts."""
    flow.draw_folder(finished.root / "trusted", 6, 500)
    yield
    for path in (finished.root / "trusted").glob("05??.*"):
        path.unlink()


@pytest.mark.usefixtures("drawn_later")
def test_only_what_is_new_is_scored(finished: Finished, tmp_path: Path) -> None:
    space, kinds = flow.copied(finished.workspace, tmp_path / "workspace"), ("scores", "selections", "shards", "models")
    old = finished.run.read("round-1/curation.json")
    force = space / "scorer" / "tiny.json"
    told = json.loads(force.read_text())
    force.write_text(json.dumps(told | {"models": old["scorer"]["models"]}))  # whatever six steps of training made
    before = flow.files_below(space, *kinds)
    run = open_run(finished.recipe, workspace=str(space), console=QUIET, new=True)
    with run.workspace.lock():
        stages.crawl(run)
        stages.fetch(run)
        picked = stages.curate(run, 1, stages.first_filter(run))
    assert run.folder != finished.run.folder and run.read("lineage.json")["increments"]["trusted"] == ["0000", "0001"]
    assert (picked["selection"], picked["scores"]) == (old["selection"], old["scores"])
    after = flow.files_below(space, *kinds)
    published = {name for name in before if name.endswith((".tar", ".safetensors")) or "/0000/" in name}
    assert {name: after[name] for name in published} == {name: before[name] for name in published}
    new = {name for name in after if name not in before}
    real = [name for name in new if "/web-" in name or "/trusted-" in name]
    assert real and all("/trusted-" in name and "/0001/" in name for name in real)
    assert not [name for name in new if name.startswith("models")], "nothing was trained"
    pinned = {
        r.folder: training_jobs.pins(r, old["selection"], stages.shards(r)) for r in (run, earlier(finished, space))
    }
    increments = [{pin.folder.rsplit("/", 1)[1] for pin in pins} for pins in pinned.values()]
    assert increments == [{"0000", "0001"}, {"0000"}], "the earlier run stays pinned to what it had"


def earlier(finished: Finished, space: Path) -> Run:
    return dataclasses.replace(finished.run, workspace=Workspace.open(space))
