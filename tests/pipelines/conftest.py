"""One finished small run for all tests of this floor that only look at it; a test that changes something copies it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipelines.run import Run
from tests.pipelines import flow


@dataclass(frozen=True)
class Finished:
    """`root` holds the recipe and what it reads; the web has ended, so a run that fetches again would show."""

    root: Path
    run: Run
    summary: dict[str, Any]

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    @property
    def report(self) -> dict[str, Any]:
        return dict(self.run.read("report.json"))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """About half a minute of one core: three trainings, each a process that imports torch, and their filters."""
    root = tmp_path_factory.mktemp("flow")
    with flow.drawn(root):
        run, summary = flow.run_stages(root / "recipe.yaml", root / "workspace")
    yield Finished(root, run, summary)
