"""Whether a round's models may score the next round: each role on its own, against the model in force.

A CLIP and a match filter are asked for their canary recall at equal false drops; a captioner for the match probability
that the filter in force gives its captions of untouched twins. Both on the half of the canaries that reports, of pairs
that no model of the run was trained on. A model that isn't worse takes its place. What the comparison needs lies in
score tables, so it costs nothing the second time.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from filters import canaries
from filters.canary_figures import mean, recall_at_false_drops
from filters.engine import plan
from filters.lookup import load_filter
from pairs.pretrain import PREVIOUS
from pairs.shard import ShardRef
from pipelines.curation import ROLES, score
from pipelines.models import model_folder
from pipelines.run import Run

Facts = dict[str, Any]
FALSE_DROPS = 0.05  # at which two scorers are compared
FILTERS = {role: name for name, role in ROLES.items()}
RECALL = f"canary recall at {FALSE_DROPS:.0%} false drops"
TOLD = {"clip": RECALL, "matcher": RECALL, "captioner": "match probability of captions"}


def compare(run: Run, number: int, scorer: Facts, models: dict[str, str]) -> Facts:
    """Which of the round's `models` (by role) may score the next round, with the figures (`roles`) that say so. None
    moves without a filter that follows the rounds, or without canaries, or where the model takes columns."""
    curated = run.read(f"round-{number}/curation.json")
    refs = [ShardRef(folder, 0) for folder in curated["canary_shards"] if "/swapped_text-" in folder]
    roles, made = {}, 0
    for role, sha in sorted(models.items()):
        if why := _stays(run, role, refs):
            roles[role] = {"promoted": False, "told": f"The {_word(role)} stays: {why}."}
            continue
        figures = {}
        for name, model in {"new": sha, "in force": scorer["models"][role]}.items():
            figures[name], wrote = _figure(run, number, scorer, role, model, refs)
            made += wrote
        roles[role] = _verdict(role, figures["new"], figures["in force"])
    told = " ".join(facts["told"] for facts in roles.values())
    return {"promoted": [r for r, facts in roles.items() if facts["promoted"]], "reused": not made, "told": told, "roles": roles}


def _stays(run: Run, role: str, refs: Sequence[ShardRef]) -> str | None:
    """Why a role's model can't be compared."""
    filters, towers = run.recipe.filters, run.recipe.pretrain.towers
    whys = {
        "no filter follows the rounds": PREVIOUS not in filters.get(FILTERS[role], {}).values(),
        "no filter matches its captions": role == "captioner" and "blip_match" not in filters,
        "this round's model takes columns, not images": bool(towers.image.features or towers.text.features),
        "there are no canaries to compare on": not refs,
    }
    return next((why for why, holds in whys.items() if holds), None)


def _figure(run: Run, number: int, scorer: Facts, role: str, sha: str, refs: Sequence[ShardRef]) -> tuple[Facts, int]:
    """A model's figure, and of how many shards it had to be scored for that."""
    models = scorer["models"] | {role: sha}
    changes: dict[str, Facts] = {FILTERS[role]: {}}
    if role == "matcher":
        changes["blip_match"] = {"of": ["texts"]}
    if role == "captioner":
        changes["blip_match"] = {"of": ["blip_caption.texts"]}
    planned = plan({name: load_filter(name, _settings(run, name, models) | own) for name, own in changes.items()})
    made = score(run, planned, refs, f"compare round {number}")
    column = "cosine" if role == "clip" else "probability"
    table = run.workspace.store.read_table(refs[0].beside(planned[-1].folder), [column])[column].to_pylist()
    canary, twin = canaries.reporting(canaries.facts(run.workspace.store, refs[0]))
    if role == "captioner":  # without a caption: 0
        return mean(np.array([np.mean([p or 0.0 for p in row or [0.0]]) for row in table])[twin]), made
    values = np.array([row[0] if isinstance(row, list) and row else row or None for row in table], float)
    return recall_at_false_drops(values[canary], values[twin], FALSE_DROPS), made


def _settings(run: Run, name: str, models: dict[str, str]) -> Facts:
    """A filter's settings with the model of its role in place of `previous`."""
    settings = run.recipe.filters[name]
    folder = str(model_folder(run.workspace, models[ROLES[name]])) if PREVIOUS in settings.values() else ""
    return {key: folder if value == PREVIOUS else value for key, value in settings.items()}
