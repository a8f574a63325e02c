"""The scorer in force: the models that score what scheduled runs add, until someone asks for better ones.

`scorer/<recipe name>.json` is written when a run ends its report. A run that looks for what is new settles once whether
it keeps that scorer (`scorer.json` in its folder), so that going on with it later decides nothing anew. With the models
stay the filters' fingerprints, the score tables, the selection's folder: only new shards are scored and selected.
"""

import json
from typing import Any

from pairs.errors import PairmillError
from pairs.pretrain import BEGINNING
from pipelines.models import model_folder
from pipelines.run import Run

Facts = dict[str, Any]


def kept(run: Run) -> Facts | None:
    """The scorer (name, models by role) that this run has settled to keep, or None."""
    told: Facts | None = (run.read("scorer.json") or {}).get("kept")
    return told


def settle(run: Run) -> Facts | None:
    """Settles whether this run keeps the scorer in force, and returns it. `--advance` never keeps one."""
    if run.read("scorer.json") is None or (run.advance and kept(run)):
        run.write("scorer.json", {"kept": _in_force(run) if run.new and not run.advance else None})
    return kept(run)


def record(run: Run) -> None:
    """Puts what the run ended with into force: what its last promotion left, else what scored its last round."""
    if kept(run) or not (ended := _ended_with(run)):
        return
    curated = run.read("round-1/curation.json") or {}
    told = ended | {"run": run.folder, "apart": curated.get("apart")}
    run.workspace.store.write(_path(run), json.dumps(told, indent=1, sort_keys=True))


def _ended_with(run: Run) -> Facts | None:
    for number in range(run.recipe.rounds, 0, -1):
        if promotion := run.read(f"round-{number}/promotion.json"):
            return dict(promotion["scorer"])
        if curated := run.read(f"round-{number}/curation.json"):
            return dict(curated["scorer"])
    return None


def _path(run: Run) -> str:
    return f"scorer/{run.recipe.name}.json"


def _in_force(run: Run) -> Facts | None:
    if not run.workspace.store.has(_path(run)):
        return None
    told = json.loads(run.workspace.store.read(_path(run)))
    spec = run.recipe.first_filter
    needed: dict[str, object] = {"clip": spec.clip, "captioner": spec.blip, "matcher": spec.blip}
    needed[BEGINNING] = BEGINNING in run.recipe.pretrain.blip.start
    if lacks := [role for role, trained in needed.items() if trained and role not in told["models"]]:
        raise PairmillError(
            expected=f"a {' and a '.join(lacks)} in the scorer in force ({_path(run)})",
            found=f"only {', '.join(told['models']) or 'published weights'}, of {told['run']}",
            remedy="add `--advance` to train the scorer anew",
        )
    for sha in told["models"].values():
        model_folder(run.workspace, sha)
    return {"name": f"{told['name']}, in force since {told['run']}", "models": told["models"]} | {
        "apart": told.get("apart")
    }
