"""A schedule that is served: it fires, adds what is new and nothing else, never overlaps, and ends when it is told to.

One `pairmill deploy` serves all tests of this file, which ask its server in plain HTTP. They are slow: a schedule fires
on the minute, and each run is a process of its own.
"""

import contextlib
import itertools
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pairs.process import ROOT, child
from pairs.workspace import Workspace
from pipelines.inspection import status
from pipelines.prefect_server import free_port
from tests.pipelines import flow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FINAL = {"Completed", "Failed", "Crashed", "Cancelled"}
PATIENCE_S = 240.0


def recipe(root: Path) -> dict[str, Any]:
    """A recipe that trains for a moment and loads no model to score."""
    source = {"kind": "folder", "path": str(root / "web")}
    trusted = {"kind": "folder", "path": str(root / "trusted"), "trusted": True}
    values = {"name": "scheduled", "engine": "inline", "sources": {"web": source, "trusted": trusted}}
    values |= {"fetch": {"side_px": 64, "shard_pairs": 30}, "filters": {"text_stats": {}}}
    values |= {"keep": [{"column": "text_stats.words", "min": 2}], "canaries": {"per_defect": 0}}
    return values | {"pretrain": flow.TRAIN | {"steps": 2}, "evaluate": {"retrieval": False}}


@dataclass(frozen=True)
class Served:
    """A deployment that is being served by `process`."""

    root: Path
    api: str
    process: psutil.Process
    log: Path

    @property
    def workspace(self) -> Workspace:
        return Workspace.open(self.root / "workspace")

    def ask(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.api}{path}", data, {"Content-Type": "application/json"}, method=method)
        for chances in reversed(range(20)):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or "null")
            except urllib.error.HTTPError as error:
                if error.code != 503 or not chances:  # its database is busy; Prefect's own client asks again too
                    raise
                time.sleep(0.5)
        raise AssertionError

    @property
    def deployment(self) -> str:
        (one,) = self.ask("/deployments/filter", {})
        return str(one["id"])

    def runs(self) -> dict[str, str]:
        """The state of every flow run, by id."""
        return {run["id"]: run["state_name"] for run in self.ask("/flow_runs/filter", {"limit": 100})}

    def trigger(self) -> str:
        return str(self.ask(f"/deployments/{self.deployment}/create_flow_run", {})["id"])

    def ended(self, run: str) -> str:
        """The final state of a flow run."""
        self.until(lambda: self.runs().get(run) in FINAL)
        return self.runs()[run]

    def until(self, holds: Callable[[], object], patience_s: float = PATIENCE_S) -> float:
        """Waits; returns the seconds that it took."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < patience_s, f"{self.runs()} {self.log.read_text()[-2000:]}"
            assert self.process.is_running(), self.log.read_text()[-2000:]
            time.sleep(0.5)
        return time.monotonic() - began

    def trainers(self) -> list[psutil.Process]:
        """The training processes below the deployment."""
        found = []
        for process in self.process.children(recursive=True):
            try:
                found += [process] if "training.run" in process.cmdline() else []
            except psutil.NoSuchProcess:
                continue
        return found


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Served]:
    """`pairmill deploy` while the block lasts; then it is told to end, and must not leave a process behind."""
    port, log = free_port(), root / "deploy.log"
    command = [sys.executable, "-X", "faulthandler", "-m", "pipelines.cli", "deploy", str(root / "recipe.yaml")]
    command += ["--cron", "* * * * *", "--port", str(port), "--workspace", str(root / "workspace")]
    with log.open("ab") as out, child(command, stdout=out, stderr=out, folder=ROOT) as process:
        below = psutil.Process(process.pid)
        served = Served(root, f"http://127.0.0.1:{port}/api", below, log)
        served.until(lambda: answering(served))
        yield served
        left = below.children(recursive=True) if below.is_running() else []
        process.terminate()
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it prints where each of its threads is
            process.wait(10)
            raise AssertionError(log.read_text()[-6000:]) from None
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive, "nothing outlives the deployment"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("deploy")
    flow.draw_folder(root / "web", 24, 1000)
    flow.draw_folder(root / "trusted", 12)
    flow.write_recipe(root / "recipe.yaml", recipe(root))
    with serving(root) as one:
        yield one


def answering(served: Served) -> bool:
    try:
        return bool(served.ask("/deployments/filter", {}))
    except OSError:
        return False


def test_a_schedule_fires_and_its_run_completes(served: Served) -> None:
    served.until(lambda: set(served.runs().values()) & {"Running", *FINAL}, 75 + 30)
    first = next(run for run, state in served.runs().items() if state in {"Running", *FINAL})
    assert served.ended(first) == "Completed", served.log.read_text()[-3000:]
    served.ask(f"/deployments/{served.deployment}", {"paused": True}, "PATCH")
    assert served.workspace.increments("web") == ["0000"]
    assert served.workspace.store.files("runs", "report.html")


def test_a_run_adds_what_is_new_and_nothing_where_nothing_is(served: Served) -> None:
    served.until(lambda: not {"Running", "Pending"} & set(served.runs().values()))
    before = served.workspace.increments("web")
    assert served.ended(served.trigger()) == "Completed"
    assert served.workspace.increments("web") == before, "nothing is new"
    flow.draw_folder(served.root / "web", 5, 5000)
    assert served.ended(served.trigger()) == "Completed"
    assert served.workspace.increments("web") == [*before, f"{len(before):04d}"]
    assert served.workspace.increments("trusted") == ["0000"]
    runs = [json.loads(served.workspace.store.read(p)) for p in served.workspace.store.files("runs", "report.json")]
    assert [run["rounds"][0]["adds_up"] for run in runs] == [True] * len(runs)
    left = [run["rounds"][0]["funnel"][0]["left"] for run in runs]
    assert left == sorted(left) and left[-1] == left[0] + 5


def steps(metrics: Path) -> int:
    return metrics.read_text().count("\n")


def long_run(served: Served) -> str:
    """A run that trains for hours, once it really trains."""
    values = recipe(served.root)
    values["pretrain"] |= {"steps": 1_000_000, "seed": next(SEEDS)}
    flow.write_recipe(served.root / "recipe.yaml", values)
    run = served.trigger()
    served.until(lambda: served.trainers() and any(steps(path) > 5 for path in served.root.rglob("metrics.jsonl")))
    return run


SEEDS = itertools.count(1)


def test_overlap_is_refused_and_cancelling_ends_every_process(served: Served) -> None:
    served.until(lambda: not {"Running", "Pending"} & set(served.runs().values()))
    first = long_run(served)
    second = served.trigger()
    assert served.ended(second) == "Cancelled", "the second run is not queued"
    assert served.runs()[first] == "Running"
    trainers = served.trainers()
    assert trainers
    state = {"state": {"type": "CANCELLING", "name": "Cancelling"}, "force": True}
    served.ask(f"/flow_runs/{first}/set_state", state)
    took = served.until(lambda: not any(process.is_running() for process in trainers), 60)
    assert took < 30
    assert served.ended(first) == "Cancelled"
    assert not served.trainers()
    killed = [run for run in status(served.workspace) if "killed" in {s["state"] for s in run["stages"].values()}]
    assert len(killed) == 1 and "same command again" in killed[0]["next"]
    with served.workspace.lock():
        pass


def test_the_schedule_goes_on_after_a_cancelled_run(served: Served) -> None:
    flow.write_recipe(served.root / "recipe.yaml", recipe(served.root))
    served.until(lambda: not {"Running", "Pending", "Cancelling"} & set(served.runs().values()))
    assert served.ended(served.trigger()) == "Completed"


def test_a_killed_deployment_is_served_again_and_goes_on(tmp_path: Path) -> None:
    """Neither its schedule nor its one place is held by the run that was killed with it."""
    flow.draw_folder(tmp_path / "web", 24, 1000)
    flow.draw_folder(tmp_path / "trusted", 12)
    flow.write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path))
    with serving(tmp_path) as first:
        first.ask(f"/deployments/{first.deployment}", {"paused": True}, "PATCH")
        long_run(first)
        below = first.process.children(recursive=True)
        first.process.kill()
        _, alive = psutil.wait_procs(below, timeout=20)
        assert not alive, "no child outlives it, however it ends"
    flow.write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path))
    with serving(tmp_path) as second:
        # It isn't served to stand still: what paused it before was before.
        second.until(lambda: not second.ask("/deployments/filter", {})[0]["paused"], 60)
        second.until(lambda: "Completed" in second.runs().values(), 300)
