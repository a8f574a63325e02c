"""Whether a round's models may score the next round: each role on its own, against the model in force.

A CLIP and a match filter are asked for their canary recall at equal false drops; a captioner for the match probability
that the filter in force gives its captions of untouched twins. Both on the half of the canaries that reports, of pairs
that no model of the run was trained on. A model that isn't worse takes its place; where few report, none does. What a
comparison needs lies in score tables, so it costs nothing the second time.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from filters import canaries
from filters.canary_figures import recall_at_false_drops
from filters.engine import PlannedFilter
from pairs.pretrain import PREVIOUS
from pairs.shard import ShardRef
from pipelines.curation import ROLES, planned_filters, score
from pipelines.run import Run

Facts = dict[str, Any]
FALSE_DROPS = 0.05  # at which two scorers are compared
FEWEST = 20  # reporting canaries by which they are
FILTERS = {role: name for name, role in ROLES.items()}
RECALL = f"canary recall at {FALSE_DROPS:.0%} false drops"
FIGURES = {"clip": RECALL, "matcher": RECALL, "captioner": "match probability of captions"}
WORDS = {"clip": "scorer", "matcher": "match filter", "captioner": "captioner"}
ASKED: dict[str, dict[str, Facts]] = {  # by role: the filters that measure a figure, with settings of their own
    "clip": {"clip": {}},
    "matcher": {"blip_match": {"of": ["texts"]}},
    "captioner": {"blip_caption": {}, "blip_match": {"of": ["blip_caption.texts"]}},
}


def compare(run: Run, number: int, scorer: Facts, models: Mapping[str, str]) -> Facts:
    """Whether any of the round's `models` (hashes by role) is promoted, and which (`roles`), with the figures of
    both. None is without a filter that follows the rounds, without canaries, or where the model takes columns."""
    curated = run.read(f"round-{number}/curation.json")
    refs = [ShardRef(folder, 0) for folder in curated["canary_shards"] if "/swapped_text-" in folder]
    roles: dict[str, Facts] = {}
    made = 0
    for role, sha in sorted(models.items()):
        if why := _why_not(run, role, refs):
            roles[role] = {"promoted": False, "told": f"The {WORDS[role]} stays: {why}."}
            continue
        figures = {}
        for name, hashes in {"in force": scorer["models"], "new": scorer["models"] | {role: sha}}.items():
            planned = planned_filters(run, scorer | {"models": hashes}, changes=ASKED[role])
            made += score(run, planned, refs, f"compare round {number}")
            figures[name] = _figure(run, role, planned[-1], refs[0])
        roles[role] = figures | _verdict(role, figures["new"], figures["in force"])
    promoted = any(facts["promoted"] for facts in roles.values())
    told = " ".join(facts["told"] for facts in roles.values())
    return {"promoted": promoted, "roles": roles, "told": told, "reused": not made}


def _why_not(run: Run, role: str, refs: Sequence[ShardRef]) -> str | None:
    filters, towers = run.recipe.filters, run.recipe.pretrain.towers
    whys = {
        "no filter follows the rounds": PREVIOUS not in filters.get(FILTERS[role], {}).values(),
        "no filter matches its captions": not ASKED[role].keys() <= filters.keys(),
        "this round's model takes columns, not images": bool(towers.image.features or towers.text.features),
        "there are no canaries to compare it on": not refs,
    }
    return next((why for why, holds in whys.items() if holds), None)


def _verdict(role: str, facts: Facts, before: Facts) -> Facts:
    if (count := min(facts["n"], before["n"])) < FEWEST:
        told = f"The {WORDS[role]} stays: {count} canaries report, too few to tell (at least {FEWEST} are asked)."
        return {"promoted": False, "told": told}
    new, old = facts["value"], before["value"]
    told = f"{FIGURES[role].capitalize()}: {new:.1%} by this round's {WORDS[role]}, {old:.1%} by the one in force; "
    told += "this round's takes its place." if new >= old else f"the {WORDS[role]} stays."
    return {"promoted": new >= old, "told": told}


def _figure(run: Run, role: str, planned: PlannedFilter, ref: ShardRef) -> Facts:
    column = "cosine" if role == "clip" else "probability"
    rows = run.workspace.store.read_table(ref.beside(planned.folder), [column])[column].to_pylist()
    canary, twin = canaries.reporting(canaries.facts(run.workspace.store, ref))
    values = np.array([_mean(row) if isinstance(row, list) else row for row in rows], float)
    if role != "captioner":
        return recall_at_false_drops(values[canary], values[twin], FALSE_DROPS)
    from pipelines.cider import mean  # with its library, a second

    return mean(list(np.nan_to_num(values[twin])), 1.0)  # no caption matches nothing


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
