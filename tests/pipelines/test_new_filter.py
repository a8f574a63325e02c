"""`pairmill new-filter`: what it writes works, keeps the house's rules, and is what the manual shows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pairs.errors import PairmillError
from pairs.process import ROOT
from pipelines import cli, new_filter
from pipelines.new_filter import FILTER, hint, write_filter


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the filters' contract test needs of a checkout."""
    for folder in ("pairs", "cluster", "filters", "training", "tests/filters"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def run(checkout: Path, *command: str, **environment: str) -> str:
    told = subprocess.run(
        [sys.executable, "-m", *command], cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)} | environment,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    return told.stdout


def test_the_manual_shows_the_file_that_is_written() -> None:
    page = (ROOT / "docs" / "add-a-filter.md").read_text()
    shown = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert shown == [FILTER.replace("CLASS", "Brightness")]


def test_a_new_filter_passes_its_test_and_the_linter(checkout: Path) -> None:
    paths = write_filter("mean_level", checkout)
    run(checkout, "ruff", "check", *map(str, paths))
    run(checkout, "ruff", "format", "--check", *map(str, paths))
    assert "1 passed" in run(checkout, "pytest", "tests/filters/test_mean_level.py")
    for path in paths:
        assert str(path.relative_to(checkout)) in hint("mean_level", paths)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_new_filter_is_typed_and_passes_the_contract_with_golden_scores_of_its_own(checkout: Path) -> None:
    paths = write_filter("mean_level", checkout)
    contract = ("pytest", "tests/filters/test_contract.py", "-k", "mean_level")
    assert "7 passed" in run(checkout, *contract, WRITE_GOLDEN="1")
    assert "7 passed" in run(checkout, *contract)
    run(checkout, "mypy", "--follow-imports=silent", "--disallow-untyped-defs", *map(str, paths))


@pytest.mark.parametrize(
    "name", ["Text", "1st", "a-b", "../x", "a__b", "class", "filter", "pairs", "x" * 41, "a\n", ""]
)
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="a filter's name"):
        write_filter(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="a checkout of pairmill"):
        write_filter("mean_level", tmp_path)
    for name in ("filters", "tests/filters"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tests/filters/test_mean_level.py").write_text("mine")
    with pytest.raises(PairmillError, match="there already"):
        write_filter("mean_level", tmp_path)
    assert not list((tmp_path / "filters").iterdir())


def test_the_command_says_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("filters", "tests/filters"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(new_filter, "write_filter", lambda name: write_filter(name, tmp_path))
    told = CliRunner().invoke(cli.app, ["new-filter", "mean_level"])
    assert told.exit_code == 0 and (tmp_path / "filters" / "mean_level.py").exists()
    for words in ("filters/mean_level.py", "tests/filters/test_mean_level.py", "WRITE_GOLDEN=1", "mean_level.value"):
        assert words in told.output
    taught = CliRunner().invoke(cli.app, ["new-filter", "--help"]).output
    assert "docs/add-a-filter.md" in taught and "drops nothing" in taught
