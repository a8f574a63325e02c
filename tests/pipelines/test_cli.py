"""Mistakes on the command line and in recipes: one message that says what was expected, found and to do, exit code 2,
and nothing written. What only shows once a flow runs is in test_flywheel.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pairs.process import ROOT
from pairs.workspace import Workspace
from tests.pipelines import flow

Values = dict[str, Any]
PAIRMILL = Path(sys.executable).with_name("pairmill")


def told(answer: flow.Told, *words: str) -> None:
    """It is advice: three lines, and each of `words` in it."""
    assert answer.code == 2, answer
    lines = [line.split()[0] for line in answer.err.removeprefix("pairmill: ").strip().splitlines()]
    assert lines == ["expected", "found", "do"], answer.err
    assert "Traceback" not in answer.err and answer.out == ""
    for word in words:
        assert word in answer.err, answer.err


def edited(change: Callable[[Values], object]) -> Callable[[Path], str]:
    """Text of the small recipe with a mistake in it; `eval` and `trusted` need not exist but for the last check."""

    def text(root: Path) -> str:
        (root / "eval").mkdir(exist_ok=True)
        values = flow.recipe(root)
        change(values)
        return flow.write_recipe(root / "changed.yaml", values).read_text()

    return text


MISTAKES: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "not YAML": (lambda root: "name: [tiny\nsources: }", ("YAML", "line 2")),
    "a list": (lambda root: "- name: tiny", ("a mapping", "list")),
    "a key twice": (lambda root: "name: tiny\nname: small\n", ("'name' stands twice",)),
    "a misspelt key": (edited(lambda v: v.update(fliters={})), ("'fliters'", "did you mean 'filters'?")),
    "a misspelt setting": (edited(lambda v: v["fetch"].update(side=64)), ("'side'", "did you mean 'side_px'?")),
    "a wrong value": (edited(lambda v: v.update(rounds=0)), ("rounds", "0")),
    "a misspelt filter": (edited(lambda v: v["filters"].update(text_stat={})), ("'text_stat'", "'text_stats'")),
    "a misspelt filter setting": (
        edited(lambda v: v["filters"].update(clip={"wieghts": "x"})),
        ("'wieghts'", "'weights'"),
    ),
    "an unknown reducer": (edited(lambda v: v["reducers"].update(near_dupes={})), ("'near_dupes'",)),
    "an unknown source kind": (edited(lambda v: v["sources"]["web"].update(kind="ftp")), ("'ftp'", "sources.web.kind")),
    "a misspelt column": (
        edited(lambda v: v["keep"].insert(0, {"column": "text_stats.word", "min": 2})),
        ("'text_stats.word'", "did you mean 'text_stats.words'?"),
    ),
    "a column that no filter makes": (
        edited(lambda v: v["keep"].insert(0, {"column": "language.code", "equals": "en"})),
        ("'language.code'", "none makes"),
    ),
    "one of what is no group": (
        edited(lambda v: v["keep"].append({"one_per": "pairs.sha256"})),
        ("'pairs.sha256'", "one_per", "use one of: exact_duplicates.group"),
    ),
    "one of a filter's column": (
        edited(lambda v: v["keep"].append({"one_per": "image_hash.sha256"})),
        ("'image_hash.sha256'", "one_per", "use one of: exact_duplicates.group"),
    ),
    "one of a misspelt group": (
        edited(lambda v: v["keep"].append({"one_per": "exact_duplicate.group"})),
        ("'exact_duplicate.group'", "did you mean 'exact_duplicates.group'?"),
    ),
    "equal lists of texts": (
        edited(lambda v: v["reducers"].update(text_duplicates={"text": "blip_caption.texts"})),
        ("reducers.text_duplicates.text", "type string", "list<item: string>", "use one of: pairs.uid"),
    ),
    "equal numbers": (
        edited(lambda v: v["reducers"].update(text_frequency={"text": "text_stats.words"})),
        ("reducers.text_frequency.text", "'text_stats.words', of type int32"),
    ),
    "a misspelt column of texts": (
        edited(lambda v: v["reducers"].update(text_frequency={"text": "txt"})),
        ("reducers.text_frequency.text", "'pairs.txt'", "did you mean 'pairs.text'?"),
    ),
    "embeddings that are texts": (
        edited(lambda v: v["reducers"].update(semantic_duplicates={"embedding": "blip_caption.texts"})),
        ("reducers.semantic_duplicates.embedding", "list<item: string>", "clip.image"),
    ),
    "a match that nothing makes": (
        edited(lambda v: v["filters"].pop("blip_match")),
        ("'blip_match.probability'", "texts"),
    ),
    "a match of other texts": (
        edited(lambda v: v["filters"].update(blip_match={"weights": "previous", "of": ["texts"]})),
        ("texts.from", "['texts']"),
    ),
    "no classes to evaluate on": (
        edited(lambda v: v["evaluate"]["zero_shot"].update(path="nowhere/at/all")),
        ("evaluate.zero_shot", "nowhere/at/all"),
    ),
    "nothing trusted to begin with": (
        edited(lambda v: v["sources"]["trusted"].update(trusted=False)),
        ("trusted: true", "web, trusted"),
    ),
    "a filter whose weights aren't there": (
        edited(lambda v: v["filters"].update(aesthetic={"kind": "probe", "weights": "no/head.safetensors"})),
        ("no/head.safetensors", "no such file"),
    ),
    "a filter whose kind is none": (
        edited(lambda v: v["filters"].update(aesthetic={"kind": "probes", "weights": "x"})),
        ("'probes'", "did you mean 'probe'?"),
    ),
    "the round's model where none is made": (
        edited(lambda v: v["filters"].update(aesthetic={"kind": "probe", "weights": "previous"})),
        ("filters.aesthetic", "clip, blip_caption, blip_match"),
    ),
    "a quarantine of duplicates": (
        edited(lambda v: v["keep"].append({"one_per": "exact_duplicates.group", "quarantine": True})),
        ("quarantine", "a `column`"),
    ),
    "no model for the first round": (
        edited(lambda v: v.pop("first_filter")),
        ("filters.clip", "'previous'", "first_filter"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("verb", ["run", "deploy"])
def test_a_mistake_in_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str, verb: str) -> None:
    text, words = MISTAKES[mistake]
    path = tmp_path / "recipe.yaml"
    path.write_text(text(tmp_path))
    told(flow.command(capsys, verb, str(path), "--workspace", str(tmp_path / "workspace")), *words)
    assert not (tmp_path / "workspace").exists(), "a mistake leaves nothing"


def test_a_missing_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("run", "crawl", "fetch", "curate", "pretrain", "evaluate", "report", "deploy"):
        told(flow.command(capsys, verb, str(tmp_path / "none.yaml")), "none.yaml", "no such file", "recipes/")


def test_an_engine_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = flow.write_recipe(tmp_path / "recipe.yaml", flow.recipe(tmp_path))
    answer = flow.command(capsys, "run", str(path), "--engine", "spark", "--workspace", str(tmp_path / "workspace"))
    told(answer, "spark", "ray or inline")
    assert not (tmp_path / "workspace").exists()


def test_a_workspace_of_another_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval").mkdir()
    path = flow.write_recipe(tmp_path / "recipe.yaml", flow.recipe(tmp_path))
    space = tmp_path / "workspace"
    Workspace.open(space, create=True)
    (space / "workspace.json").write_text(json.dumps({"format": 99}))
    for arguments in (["run", str(path), "--workspace", str(space)], ["ls", str(space)], ["verify", str(space)]):
        told(flow.command(capsys, *arguments), "format 99", "release that made it")
    assert [entry.name for entry in space.iterdir()] == ["workspace.json"]


def test_a_folder_that_is_no_workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "eval").mkdir()
    path = flow.write_recipe(tmp_path / "recipe.yaml", flow.recipe(tmp_path))
    for verb in ("ls", "status", "verify"):
        told(flow.command(capsys, verb, str(tmp_path / "eval")), "no workspace.json there")
    told(flow.command(capsys, "run", str(path), "--workspace", str(tmp_path)), "other files", "another --workspace")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "prefect").exists()


def test_a_command_that_is_none_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    answer = flow.command(capsys, "rnu")
    assert answer.code == 2 and "Traceback" not in answer.err and "No such command" in answer.err


@pytest.mark.timeout(120)
def test_the_installed_command_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run([PAIRMILL, "run", tmp_path / "none.yaml"], capture_output=True, text=True, cwd=tmp_path)
    told(flow.Told(done.returncode, done.stdout, done.stderr), "none.yaml")
    assert list(tmp_path.iterdir()) == []


BROKEN = """
import sys
import pipelines.inspection
def bug(*_):
    raise {error}
pipelines.inspection.tell_contents = bug
from pipelines.cli import main
sys.argv = ["pairmill", "ls", sys.argv[1]]
main()
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("error", "code"), [("AssertionError('a bug of ours')", 1), ("KeyboardInterrupt", 130)])
def test_exit_codes_of_a_bug_and_of_an_interruption(tmp_path: Path, error: str, code: int) -> None:
    Workspace.open(tmp_path / "workspace", create=True)
    script = [sys.executable, "-c", BROKEN.format(error=error), str(tmp_path / "workspace")]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)
    assert ("goes on where it stopped" in done.stderr) == (code == 130)
