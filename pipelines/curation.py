"""Curation of one round: score what is missing, reduce, plant and ask the canaries, select, write training shards.

Filters measure and the selection judges; this file only brings them together. `previous` in a filter's settings
stands for the model that the scorer (a round's facts) names for that filter's role.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cluster.guard import Guard
from cluster.session import ray_session
from filters import canaries
from filters.base import Filter, Reducer
from filters.canary_report import Judged, report
from filters.columns import OWN, as_bool, load_frame
from filters.defects import DEFECTS
from filters.engine import PlannedFilter, missing, plan, score_shards
from filters.lookup import load_filter, load_reducer
from filters.reduce import run_reducers
from filters.score_tables import MADE_WITH
from filters.selection import look_alikes, select
from filters.texts import column_names
from pairs.errors import PairmillError
from pairs.pretrain import PREVIOUS
from pairs.recipe import Recipe
from pairs.rules import Rule, TextsSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef
from pairs.strict import nearest
from pairs.uid_lists import load_uid_list
from pipelines import scorer as scorer_in_force
from pipelines.models import model_folder
from pipelines.report import filters as filters_report
from pipelines.run import Run
from pipelines.training_shards import publish_training_shards
from training.launch import NVIDIA

Facts = dict[str, Any]
Shards = Mapping[str, Sequence[ShardRef]]
ROLES = {"clip": "clip", "blip_caption": "captioner", "blip_match": "matcher"}
VECTOR = pa.list_(pa.float16())  # as filters keep vectors; lists of other floats are values of each text


def check(recipe: Recipe) -> None:
    """Names every filter, setting or column that doesn't exist, before anything runs."""
    loaded: dict[str, Filter | Reducer] = {name: load_filter(name, s) for name, s in recipe.filters.items()}
    loaded |= {name: load_reducer(name, s) for name, s in recipe.reducers.items()}
    _check_columns(recipe, loaded)
    matcher = loaded.get((recipe.texts.match or "").partition(".")[0])
    if (of := getattr(matcher, "of", None)) and list(of) != recipe.texts.sources:
        raise PairmillError(
            expected=f"texts.from to name what {recipe.texts.match} is measured of: {list(of)}",
            found=str(recipe.texts.sources),
            remedy="give both the same columns in the same order",
        )
    _check_rules(recipe)
    _check_towers(recipe, loaded)
    for name, settings in recipe.filters.items():
        if PREVIOUS in settings.values() and name not in ROLES:
            raise PairmillError(
                expected=f"{PREVIOUS!r} as a setting of {', '.join(ROLES)} alone, under these names",
                found=f"it at filters.{name}",
                remedy="name a folder or a file there",
            )
        if PREVIOUS not in settings.values():
            loaded[name].check()
        elif not _trains(recipe, ROLES[name]):
            raise PairmillError(
                expected=f"a model for filters.{name} in round 1",
                found=f"{PREVIOUS!r}, and no first_filter that trains a {ROLES[name]}",
                remedy="add first_filter to the recipe, or name published weights or a folder",
            )


def _check_columns(recipe: Recipe, loaded: Mapping[str, Filter | Reducer]) -> None:
    """Every column that is named is made, is of the type that a reducer's setting takes, and makes groups for
    `one_per`."""
    made = {f"{OWN}.{field.name}": field.type for field in PAIRS}
    made |= {f"{name}.{column}": kind for name, one in loaded.items() for column, kind in one.columns.items()}
    reducers = {name: one for name, one in loaded.items() if isinstance(one, Reducer)}
    groups = [c for c, kind in made.items() if c.partition(".")[0] in reducers and pa.types.is_string(kind)]
    wanted = [("keep", column) for rule in recipe.keep for column in (rule.column, rule.best) if column is not None]
    wanted += [("texts", column) for column in column_names(recipe.texts)]
    wanted += [(name, need) for name, one in loaded.items() for need in one.needs if "." in need]
    takes = []
    for name, setting, kind in ((name, *taken) for name, one in reducers.items() for taken in one.takes.items()):
        if (column := getattr(loaded[name], setting)) is not None:
            takes.append((f"reducers.{name}.{setting}", column if "." in column else f"{OWN}.{column}", kind))
    for where, column in [*wanted, *((where, column) for where, column, _ in takes)]:
        if column not in made:
            raise PairmillError(
                expected=f"a column that a filter or reducer of the recipe makes, at {where}",
                found=f"{column!r}, which none makes",
                remedy=nearest(column, [*made]),
            )
    for where, column, kind in takes:
        if not _alike(made[column], kind):
            raise PairmillError(
                expected=f"a column of type {kind} at {where}",
                found=f"{column!r}, of type {made[column]}",
                remedy="use one of: " + (", ".join(c for c in made if _alike(made[c], kind)) or "none is made yet"),
            )
    for column in (rule.one_per for rule in recipe.keep if rule.one_per is not None):
        if column not in groups:
            raise PairmillError(
                expected="a column of groups that a reducer of the recipe makes, at one_per in keep",
                found=f"{column!r}" + (f", which {column.partition('.')[0]} makes" if column in made else ""),
                remedy=nearest(column, groups) if groups else "add a reducer, such as exact_duplicates",
            )


def _check_towers(recipe: Recipe, loaded: Mapping[str, Filter | Reducer]) -> None:
    """Towers that are columns name vectors that a filter makes, the text tower's of the pair or of each text; nothing
    that looks at images can use their model."""
    towers = recipe.pretrain.towers
    made = {f"{name}.{c}": kind for name, one in loaded.items() for c, kind in one.columns.items()}
    for where, start, kinds in (("image", towers.image, (VECTOR,)), ("text", towers.text, (VECTOR, pa.list_(VECTOR)))):
        vectors = [name for name, kind in made.items() if kind in kinds]
        for odd in (name for name in start.features if name not in vectors):
            raise PairmillError(
                expected=f"a column of fp16 vectors that a filter of the recipe makes, at pretrain.towers.{where}",
                found=f"{odd!r}" + (f", of type {made[odd]}" if odd in made else ""),
                remedy=nearest(odd, vectors) if vectors else "add a filter that makes one, such as clip",
            )
    named = towers.image.features or towers.text.features
    if named and (recipe.evaluate.retrieval or recipe.evaluate.zero_shot or recipe.rounds > 1):
        raise PairmillError(
            expected="evaluate: {retrieval: false} and rounds: 1 where pretrain.towers are features",
            found="another setting: such a model takes columns, not images",
            remedy="set these, or train towers that start from `weights`",
        )


def _alike(kind: pa.DataType, wanted: pa.DataType) -> bool:
    """Floats of any width are alike, and so are lists of them."""
    if pa.types.is_list(wanted):
        lists = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)
        return lists and _alike(kind.value_type, wanted.value_type)
    return bool(kind == wanted or (pa.types.is_floating(kind) and pa.types.is_floating(wanted)))


def _check_rules(recipe: Recipe) -> None:
    """Every source, defect and list that rules and canaries name is there."""
    planted = [name for name in DEFECTS if name in (recipe.canaries.defects or DEFECTS)]
    asked = [("sources in keep", source, list(recipe.sources)) for rule in recipe.keep for source in rule.sources or {}]
    asked += [("canaries.defects", name, list(DEFECTS)) for name in recipe.canaries.defects or []]
    floors = recipe.gates.min_canary_recall
    asked += [("gates.min_canary_recall", name, planted) for name in (floors if isinstance(floors, dict) else {})]
    if recipe.texts.false_drops is not None:
        asked.append(("canaries.defects, for texts.false_drops", "swapped_text", planted))
    asked += (
        [("filters, for gates.min_captions", "blip_caption", [*recipe.filters])] if recipe.gates.min_captions else []
    )
    for case in (case for rule in recipe.keep for case in rule.cases().values() if case):
        asked += [("defect in keep", case.defect, planted)] if case.defect else []
        if case.target_recall is not None:  # canaries have no tables of reducers
            asked.append(("a filter's column for target_recall", str(case.column).partition(".")[0], [*recipe.filters]))
        if case.in_list is not None:
            load_uid_list(Path(case.in_list))
    for where, name, choices in asked:
        if name not in choices:
            raise PairmillError(expected=f"a known name at {where}", found=repr(name), remedy=nearest(name, choices))


def _trains(recipe: Recipe, role: str) -> bool:
    return (recipe.first_filter.clip if role == "clip" else recipe.first_filter.blip) is not None


def planned_filters(run: Run, scorer: Facts, changes: Mapping[str, Facts] | None = None) -> list[PlannedFilter]:
    """The recipe's filters with the scorer's models in place of `previous`; only those in `changes` where that is
    given, with these settings of their own."""

    def settled(name: str, settings: Mapping[str, Any]) -> Filter:
        models = scorer["models"]
        folder = str(model_folder(run.workspace, models[ROLES[name]])) if PREVIOUS in settings.values() else ""
        return load_filter(name, {key: folder if value == PREVIOUS else value for key, value in settings.items()})

    given = run.recipe.filters
    chosen = given if changes is None else {name: given[name] | own for name, own in changes.items()}
    return plan({name: settled(name, settings) for name, settings in chosen.items()})


def select_trusted(run: Run, shards: Shards, scores: Mapping[str, str]) -> str:
    """A selection of the trusted pairs alone, with their own texts; returns its folder. What shares its bytes with a
    held-out pair isn't in it, nor what shares a group of a `one_per` where there are `scores` (none before round 1)."""
    spec, groups = TextsSpec(), _groups(run, scores)
    chosen = select(run.workspace.store, "trusted", groups, spec, shards, scores, run.recipe.trusted)
    publish_training_shards(run.workspace, chosen.folder, shards, run.recipe.trusted)
    return chosen.folder


def plant(run: Run, shards: Shards) -> list[ShardRef]:
    """The canary shards of the run's pairs."""
    spec, held = run.recipe.canaries, scorer_in_force.kept(run)
    only = held.get("apart") if held else None  # what a kept scorer hasn't trained on
    return canaries.make_canaries(run.workspace.store, shards, run.recipe.trusted, spec, run.recipe.seed, only)


def set_apart(run: Run, shards: Shards, planted: Sequence[ShardRef], scores: Mapping[str, str]) -> list[str]:
    """uids that no model of the run trains on, because canaries are made from them or from a pair with their bytes, or
    in their group of a `one_per` where there are `scores`."""
    store, trusted = run.workspace.store, run.recipe.trusted
    of = {name: refs for name, refs in shards.items() if name in trusted or not trusted}
    return look_alikes(store, _groups(run, scores), of, scores, canaries.set_apart(store, planted))


def _groups(run: Run, scores: Mapping[str, str]) -> list[Rule]:
    return [rule for rule in run.recipe.keep if rule.one_per is not None and scores]


def curate(run: Run, number: int, scorer: Facts, shards: Shards) -> Facts:
    """One round's curation; returns its selection, counts, and what the canaries tell."""
    recipe, store = run.recipe, run.workspace.store
    planted = plant(run, shards)
    planned = planned_filters(run, scorer)
    everything = [ref for refs in shards.values() for ref in refs] + planted
    scored = score(run, planned, everything, f"score round {number}")
    scores = {one.name: one.folder for one in planned}
    reducers = {name: load_reducer(name, settings) for name, settings in recipe.reducers.items()}
    how: Any = (run.engine, recipe.workers)
    scores |= run_reducers(store, reducers, shards, scores, recipe.trusted, *how)
    given = (recipe.keep, recipe.texts, shards, scores, recipe.trusted)
    chosen = select(store, recipe.name, *given, recalibrate=run.recalibrate, canaries=planted)
    published = publish_training_shards(run.workspace, chosen.folder, shards, recipe.trusted)
    origins = set_apart(run, shards, planted, scores)
    apart = published.count(store, origins)
    pins = chosen.manifest["thresholds"]
    real = Judged(store, shards, recipe.trusted, scores, reducers, recipe.keep, recipe.texts, chosen.folder, pins, *how)
    told = report(planted, real)
    recalls = {name: facts["rules"][-1]["recall"] for name, facts in told["defects"].items()}
    return {
        "selection": chosen.folder,
        "kept": chosen.kept,
        "kept_untrusted": sum(f["kept"] for s, f in chosen.funnel["sources"].items() if s not in recipe.trusted),
        "scores": scores,
        "captions": captions(run, shards, scores),
        "canaries": told,
        "canary_shards": [ref.folder for ref in planted],
        "canary_recall": recalls,
        "training_pairs": published.total - apart,
        "set_apart": apart,
        "apart": origins,
        "reused": not scored and not chosen.written and not published.wrote,
    }


def captions(run: Run, shards: Shards, scores: Mapping[str, str]) -> Facts | None:
    """The share of the untrusted living `pairs` that have a caption, how many have none by reason (`without`), and this
    in words; None without such pairs or a captioner."""
    if "blip_caption" not in scores:
        return None
    of = {name: refs for name, refs in shards.items() if name not in run.recipe.trusted}
    frame = load_frame(run.workspace.store, of, ["blip_caption.texts", "blip_caption.reason"], scores, [])
    if not (pairs := int(frame.alive.sum())):
        return None
    none = frame.alive & ~as_bool(pc.greater(pc.list_value_length(frame.table["blip_caption.texts"]), 0))
    reasons = pc.fill_null(frame.table["blip_caption.reason"].filter(pa.array(none)), "unmeasured")
    without = dict(Counter(reasons.to_pylist()).most_common())
    share = 1 - int(none.sum()) / pairs
    told = f"captions for {share:.1%} of {pairs} untrusted pairs"
    told += f" (none: {', '.join(f'{name} {count}' for name, count in without.items())})" if without else ""
    return {"pairs": pairs, "share": share, "without": without, "told": told}


def score(run: Run, planned: Sequence[PlannedFilter], refs: Sequence[ShardRef], told: str) -> int:
    """Makes the missing score tables; returns of how many shards. Ray starts here, and only if something is missing."""
    store = run.workspace.store
    left = missing(store, planned, refs)
    if not left:
        return 0
    for one in planned:  # whoever has a table finds the model that made it, such as the one that wrote a text
        if not store.has(path := f"{one.folder}/{MADE_WITH}") and (content := one.filter.content_hashes()):
            store.write(path, json.dumps(content))
    show = run.console.progress(told)
    # For one shard a child process does, with the same bytes: Ray starts slower. Where GPUs are its workers have them.
    alone = len(left) == 1 and "RAY_ADDRESS" not in os.environ and not NVIDIA.exists()
    guard = run.hold("guard", Guard()) if alone and run.engine == "ray" else None
    if run.engine == "ray" and not guard:
        run.hold("ray", ray_session(run.recipe.workers))
    stats = score_shards(
        store,
        planned,
        refs,
        engine=run.engine,  # type: ignore[arg-type]
        guard=guard,
        workers=run.recipe.workers,
        progress=lambda done, total: show(done, total, "shards"),
        dead=run.workspace.tombstones(),
    )
    filters_report.keep(run, stats)
    return len(left)
