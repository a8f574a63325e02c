"""A run is found again by its recipe, and its stages tell how they ended."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pairs.errors import PairmillError
from pairs.process import ROOT, child
from pipelines.console import Console
from pipelines.inspection import status
from pipelines.run import Run, open_run
from tests.pipelines import flow

QUIET = Console(quiet=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return flow.write_recipe(tmp_path / "recipe.yaml", flow.recipe(tmp_path))


def opened(path: Path, **options: Any) -> Run:
    return open_run(path, workspace=str(path.parent / "workspace"), console=QUIET, **options)


def test_the_same_recipe_finds_its_run_again(path: Path, tmp_path: Path) -> None:
    first = opened(path)
    assert first.folder.startswith("runs/tiny-") and first.folder.endswith("-0001")
    assert opened(path).folder == first.folder
    assert opened(path, engine="ray").folder == first.folder, "where it runs is no part of what it makes"
    values = flow.recipe(tmp_path)
    flow.write_recipe(path, values | {"workers": 7, "engine": "ray"})
    assert opened(path).folder == first.folder
    flow.write_recipe(path, values | {"seed": 1})
    assert opened(path).folder != first.folder


def test_the_recorded_recipe_runs_as_the_same_run(path: Path) -> None:
    run = opened(path)
    recorded = path.parent / "workspace" / run.folder / "recipe.yaml"
    assert open_run(recorded, workspace=run.workspace.store.root, console=QUIET).folder == run.folder


def test_new_work_is_a_new_run_only_after_the_last_one_ended(path: Path) -> None:
    first = opened(path, new=True)
    assert first.folder.endswith("-0001")
    with first.stage("crawl"):
        pass
    assert opened(path, new=True).folder == first.folder, "a killed run is gone on with"
    first.workspace.store.write(f"{first.folder}/report.html", "done")
    assert opened(path, new=True).folder.endswith("-0002")
    assert opened(path).folder.endswith("-0002"), "the latest is gone on with"


def test_new_work_begins_anew_where_the_last_run_failed(path: Path) -> None:
    """Otherwise a schedule would run into the same gate for ever, pinned to the increments that failed it."""
    first = opened(path, new=True)
    with pytest.raises(PairmillError), first.stage("fetch"):
        raise PairmillError(expected="a gate", found="shut", remedy="wait for other pictures")
    assert opened(path).folder == first.folder, "without new work it is tried again"
    assert opened(path, new=True).folder.endswith("-0002")


def test_a_stage_tells_how_it_ended(path: Path) -> None:
    run = opened(path)
    with run.stage("crawl") as facts:
        assert run.read("stages.json")["crawl"]["state"] == "running"
        facts["note"] = "3 candidates"
    with pytest.raises(PairmillError), run.stage("fetch"):
        raise PairmillError(expected="a web", found="none", remedy="plug it in")
    with pytest.raises(ZeroDivisionError), run.stage("curate"):
        print(1 / 0)
    with pytest.raises(SystemExit), run.stage("report"):
        sys.exit(143)
    stages = run.read("stages.json")
    assert stages["crawl"]["state"] == "done" and stages["crawl"]["note"] == "3 candidates"
    assert "plug it in" in stages["fetch"]["error"] and stages["fetch"]["trace"] is None
    assert "ZeroDivisionError" in stages["curate"]["trace"]
    assert {name: facts["state"] for name, facts in stages.items()} == {
        "crawl": "done",
        "fetch": "failed",
        "curate": "failed",
        "report": "killed",
    }


def test_a_reused_stage_keeps_the_time_it_once_took(path: Path) -> None:
    run = opened(path)
    with run.stage("crawl"):
        pass
    took = run.read("stages.json")["crawl"]["first_seconds"]
    with run.stage("crawl") as facts:
        facts["reused"] = True
    assert run.read("stages.json")["crawl"]["first_seconds"] == took
    assert run.reused == ["crawl"]


def test_what_is_held_is_entered_once_and_left_at_the_end(path: Path) -> None:
    run, told = opened(path), []

    class Session:
        def __enter__(self) -> None:
            told.append("in")

        def __exit__(self, *_: object) -> None:
            told.append("out")

    run.hold("ray", Session())
    run.hold("ray", Session())
    assert told == ["in"]
    run.close()
    run.close()
    assert told == ["in", "out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from pipelines.console import Console
from pipelines.run import open_run
run = open_run(Path(sys.argv[1]), workspace=sys.argv[2], console=Console(quiet=True))
with run.workspace.lock(), run.stage("crawl"):
    pass
with run.workspace.lock(), run.stage("fetch"):
    (Path(sys.argv[2]) / ".tmp-half").write_text("half")
    print("running", flush=True)
    signal.pause()
"""


@pytest.mark.timeout(120)
def test_a_killed_stage_is_told_and_its_lock_is_free(path: Path) -> None:
    space = path.parent / "workspace"
    with child([sys.executable, "-c", KILLED, str(path), str(space)], stdout=subprocess.PIPE, folder=ROOT) as process:
        assert process.stdout and process.stdout.readline() == b"running\n"
        with pytest.raises(PairmillError, match=f"process {process.pid}"):
            opened(path)
        process.kill()
        process.wait()
    run = opened(path)
    (told,) = status(run.workspace)
    assert {name: facts["state"] for name, facts in told["stages"].items()} == {"crawl": "done", "fetch": "killed"}
    assert "same command again" in told["next"]
    assert not list(space.glob(".tmp-*")), "the next writer sweeps what a killed one left"
    assert json.loads((space / run.folder / "stages.json").read_text())["fetch"]["state"] == "running"


def test_an_id_that_another_process_has_by_now_is_no_running_stage(path: Path) -> None:
    run = opened(path)
    with run.stage("crawl"):
        (told,) = status(run.workspace)
        assert told["stages"]["crawl"]["state"] == "running"
        mark = run.read("stages.json")
        mark["crawl"]["process_started"] -= 3600
        run.write("stages.json", mark)
        (told,) = status(run.workspace)
        assert told["stages"]["crawl"]["state"] == "killed"
