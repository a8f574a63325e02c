"""The flow under a real Prefect API: what the server remembers of a run, and mistakes that only show once it runs."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pairs.process import ROOT
from pairs.workspace import Workspace
from pipelines.prefect_server import free_port, orchestration
from tests.pipelines import flow
from tests.pipelines.conftest import Finished
from tests.pipelines.test_stages import LASTING, WORKED

pytestmark = pytest.mark.timeout(500)
RAN = """
import sys
from pipelines.cli import main
sys.argv = ["pairmill", *sys.argv[1:]]
try:
    main()
finally:
    print("ray" in sys.modules, file=sys.stderr)
"""


def recipes(root: Path, finished: Finished) -> dict[str, dict[str, Any]]:
    """Recipes whose mistake only shows when their source is opened, or when their workspace is."""
    (root / "empty").mkdir()
    (root / "empty" / "notes.txt").write_text("no image")
    plain = {"engine": "inline", "name": "tiny"}
    closed = f"http://127.0.0.1:{free_port()}/"
    folder = {"kind": "folder", "path": str(finished.root / "trusted")}
    return {
        "empty": plain | {"sources": {"none": {"kind": "folder", "path": str(root / "empty")}}},
        "unreachable": plain | {"sources": {"gone": flow.site(closed)}},
        "second": plain | {"sources": {"one": folder}},
    }


@dataclass(frozen=True)
class Answers:
    """What the server remembers, and code, output and error of each case."""

    root: Path
    flows: list[tuple[str, str]]
    tasks: list[tuple[str, str]]
    artifacts: dict[str, tuple[str, str]]
    logs: list[str]
    said: dict[str, flow.Told]

    def space(self, case: str) -> Path:
        return self.root / "spaces" / case


@pytest.fixture(scope="module")
def again(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, flow.Told]:
    """`pairmill run` on a copy of the finished workspace, as a process with an orchestration server of its own."""
    space = flow.copied(finished.workspace, tmp_path_factory.mktemp("again") / "workspace")
    command = [sys.executable, "-c", RAN, "run", str(finished.recipe), "--workspace", str(space), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return space, flow.Told(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def answers(again: tuple[Path, flow.Told], finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    root = tmp_path_factory.mktemp("cases")
    written = {name: flow.write_recipe(root / f"{name}.yaml", v) for name, v in recipes(root, finished).items()}
    cases = [["run", str(path), "--workspace", str(root / "spaces" / name)] for name, path in written.items()]
    with holding(root / "spaces" / "second"):
        command = [sys.executable, "-m", "tests.pipelines.prefect_probe", str(again[0] / "prefect"), json.dumps(cases)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    said = {name: flow.Told(*told) for name, told in zip(written, facts.pop("said"), strict=True)}
    return Answers(root=root, said=said, **facts)


@contextlib.contextmanager
def holding(space: Path) -> Iterator[None]:
    with Workspace.open(space, create=True).lock():
        yield


def test_a_second_run_reuses_everything_and_starts_no_ray(again: tuple[Path, flow.Told], finished: Finished) -> None:
    space, told = again
    assert told.code == 0, told.err
    assert told.err.split()[-1] == "False", "ray was imported, though nothing was left to score"
    assert told.json["reused"] == WORKED and told.json["run"] == finished.run.folder
    assert flow.files_below(space, *LASTING) == flow.files_below(finished.workspace, *LASTING)


def test_the_server_remembers_one_finished_run(answers: Answers) -> None:
    assert [state for _, state in answers.flows] == ["Completed"]
    expected = ["crawl", "curate", "evaluate", "fetch", "first-filter", "gates", "pretrain", "promote", "report"]
    assert sorted(name for name, _ in answers.tasks) == expected
    assert {state for _, state in answers.tasks} == {"Completed"}
    assert any("workspace" in line for line in answers.logs), "the server keeps the log"


def test_the_server_shows_funnel_and_report(
    answers: Answers, again: tuple[Path, flow.Told], finished: Finished
) -> None:
    kind, link = answers.artifacts["report"]
    assert kind == "markdown" and f"file://{again[0]}/{finished.run.folder}/report.html" in link
    kind, table = answers.artifacts["funnel-round-1"]
    assert kind == "table" and json.loads(table) == finished.report["rounds"][0]["funnel"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("empty", ("images in the source 'none'", "none")),
        ("unreachable", ("sources.gone",)),
        ("second", ("no other writer", "process ")),
    ],
)
def test_a_mistake_that_shows_late(answers: Answers, case: str, words: tuple[str, ...]) -> None:
    told = answers.said[case]
    assert told.code == 2, told
    assert "Traceback" not in told.err and told.out == ""
    for word in ("expected", "found", "do", *words):
        assert word in told.err, told.err
    space = answers.space(case)
    assert not list(space.rglob(".tmp-*")) and not list(space.rglob("*.parquet")) and not list(space.rglob("*.tar"))


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """A tmpfs of 100 KiB in a mount namespace of its own, where this machine lets us make one: enough to cut
    candidates, not enough for the pairs."""
    big = tmp_path / "big"
    big.mkdir()
    for i in range(60):
        (big / f"{i}.png").write_bytes(flow.drawing(i, 900))
    values = {"name": "tiny", "engine": "inline", "fetch": {"side_px": 900, "format": "png", "shard_pairs": 20}}
    values |= {"sources": {"big": {"kind": "folder", "path": str(big)}}}
    path, space = flow.write_recipe(tmp_path / "recipe.yaml", values), tmp_path / "workspace"
    space.mkdir()
    shell = f'mount -t tmpfs -o size=100k tmpfs "{space}" || exit 77; "$0" -c "$1" "{path}" "{space}"; find "{space}"'
    done = subprocess.run(["unshare", "-rm", "sh", "-c", shell, sys.executable, FULL], capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
    assert "no space left on the device" in done.stdout and "same command again" in done.stdout, done
    assert "candidates/big/0000/part-00000.parquet" in done.stdout, done
    assert ".tmp-" not in done.stdout and "/00000." not in done.stdout, done


FULL = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from pairs.errors import PairmillError
from pipelines import stages
from pipelines.console import Console
from pipelines.run import open_run
run = open_run(Path(sys.argv[1]), workspace=sys.argv[2], console=Console(quiet=True))
with run.workspace.lock():
    stages.crawl(run)
    try:
        stages.fetch(run)
    except PairmillError as error:
        print(error)
"""


def test_a_server_that_does_not_come_up_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "prefect.db").mkdir(parents=True)
    with pytest.raises(Exception, match="PREFECT_API_URL"), orchestration(tmp_path):
        raise AssertionError("it came up")
