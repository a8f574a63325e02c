"""One run of a recipe: which workspace, which increments it is pinned to, and what each stage has done so far.

A run is found again by its recipe's fingerprint, so that the same command goes on where a killed one stopped.
`runs/<id>/stages.json` is what `pairmill status` and the report read; it decides nothing: whether work is done
is asked of the Store alone.
"""

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import psutil
import yaml

from pairs.errors import PairmillError
from pairs.fingerprint import fingerprint
from pairs.recipe import Recipe, load_recipe
from pairs.workspace import Workspace
from pipelines.console import Console

T = TypeVar("T")


@dataclass
class Run:
    """What every stage is given. `folder` is `runs/<id>` in the workspace."""

    recipe: Recipe
    workspace: Workspace
    engine: str
    folder: str
    console: Console
    new: bool = False  # look for what is new: crawl again and cut the next increment
    recalibrate: bool = False
    advance: bool = False  # with `new`: train the scorer anew instead of keeping the one in force
    reused: list[str] = field(default_factory=list)
    _held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _holds: dict[str, Any] = field(default_factory=dict)

    @property
    def scratch(self) -> Path:
        """A local folder for checkpoints and whatever else needs a file system."""
        local = self.workspace.store.local
        base = (
            local if local else Path.home() / ".cache" / "pairmill" / fingerprint({"root": self.workspace.store.root})
        )
        path = base / self.folder
        path.mkdir(parents=True, exist_ok=True)
        return path

    def read(self, name: str) -> Any:
        """A JSON file of this run, or None."""
        path = f"{self.folder}/{name}"
        return json.loads(self.workspace.store.read(path)) if self.workspace.store.has(path) else None

    def write(self, name: str, value: Any) -> None:
        self.workspace.store.write(f"{self.folder}/{name}", json.dumps(value, indent=1, sort_keys=True, default=str))

    def hold(self, name: str, resource: contextlib.AbstractContextManager[T]) -> T:
        """Enters `resource` once, until `close`: a Ray session serves all rounds. Returns what was entered."""
        if name not in self._holds:
            self._holds[name] = self._held.enter_context(resource)
        return cast(T, self._holds[name])

    def close(self) -> None:
        """Leaves what is held."""
        self._held.close()
        self._holds.clear()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Records that `name` runs, and how it ended. What the block puts into the dict is kept as its facts;
        `facts["reused"] = True` says that there was nothing to do."""
        facts: dict[str, Any] = {}
        started = time.time()
        mark = {"state": "running", "started": started, **this_process()}
        self._mark(name, mark)
        self.console.begin(name)
        try:
            yield facts
        except BaseException as error:
            told = " ".join(str(error).split()) or type(error).__name__
            trace = None if isinstance(error, PairmillError) else traceback.format_exc(limit=-3)
            state = "failed" if isinstance(error, Exception) else "killed"  # by a signal: there is nothing to mend
            self._mark(name, mark | {"state": state, "error": told, "trace": trace, "seconds": time.time() - started})
            raise
        seconds = time.time() - started
        if facts.get("reused"):
            self.reused.append(name)
            before = (self.read("stages.json") or {}).get(name, {})
            facts.setdefault("first_seconds", before.get("first_seconds"))
        else:
            facts["first_seconds"] = seconds
        self._mark(name, mark | {"state": "done", "seconds": seconds} | facts)
        self.console.end(name, seconds, facts)

    def _mark(self, name: str, state: dict[str, Any]) -> None:
        stages = self.read("stages.json") or {}
        before = stages.get(name, {})
        if state["state"] == "running" and "first_seconds" in before:
            state = state | {"first_seconds": before["first_seconds"]}
        self.write("stages.json", stages | {name: state})


def this_process() -> dict[str, Any]:
    """What `status` knows a process again by: an id alone may be another's by then."""
    return {"process": os.getpid(), "process_started": psutil.Process().create_time()}


def open_run(
    recipe_path: Path,
    *,
    workspace: str | None = None,
    engine: str | None = None,
    new: bool = False,
    recalibrate: bool = False,
    advance: bool = False,
    console: Console | None = None,
) -> Run:
    """The run of the recipe at `recipe_path`: its latest, or the next one where `new` work is asked for."""
    recipe = load_recipe(recipe_path)
    space = Workspace.open(workspace or f"workspace/{recipe.name}", create=True)
    run = Run(recipe, space, engine or recipe.engine, "", console or Console(), new, recalibrate, advance)
    with space.lock():
        run.folder = _folder(space, recipe, new)
        if not space.store.has(f"{run.folder}/recipe.yaml"):
            text = yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True), sort_keys=False)
            space.store.write(f"{run.folder}/recipe.yaml", text)
    return run


def _folder(space: Workspace, recipe: Recipe, new: bool) -> str:
    settings = recipe.model_dump(mode="json", exclude={"engine", "workers"})
    name = f"{recipe.name}-{fingerprint(settings)}"
    before = [run for run in space.store.folders("runs") if run.startswith(f"{name}-")]
    if not before:
        return f"runs/{name}-0001"
    number = int(before[-1].rsplit("-", 1)[1]) + (1 if new and _ended(space, f"runs/{before[-1]}") else 0)
    return f"runs/{name}-{number:04d}"


def _ended(space: Workspace, folder: str) -> bool:
    """Whether a run is finished or failed; one that was killed isn't over. New work after a failed gate is a run of
    its own: going on with the old one, pinned to its increments, would fail at the same gate for ever."""
    if space.store.has(f"{folder}/report.html"):
        return True
    path = f"{folder}/stages.json"
    stages = json.loads(space.store.read(path)) if space.store.has(path) else {}
    return any(facts["state"] == "failed" for facts in stages.values())
