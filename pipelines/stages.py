"""The stages of a run as plain functions: each looks what is missing, makes it, and says what it did or reused.

The flow file orders them; tests call them. A stage gets the Run and the small facts of earlier stages (JSON), and
leaves its own in the workspace: what is done is asked of the Store alone, never of an orchestrator.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pairs.errors import PairmillError
from pairs.increments import exactly
from pairs.recipe import Recipe
from pairs.shard import ShardRef
from pipelines import capfilt, curation, evaluation, promotion, scorer, training_jobs
from pipelines.candidates import check_settings, cut_increment, finished_cut, next_increment
from pipelines.fetch.ledger import FetchCounts, fetch_fingerprint
from pipelines.fetch.shards import fetch_increment
from pipelines.run import Run
from pipelines.sources import load_source
from training.launch import preflight

Facts = dict[str, Any]


def check(recipe: Recipe) -> None:
    """Tells every mistake in the recipe that can be told before anything is written or started."""
    for name, spec in recipe.sources.items():
        load_source(name, spec)
    curation.check(recipe)
    if (recipe.first_filter.clip or recipe.first_filter.blip) and not recipe.trusted:
        raise PairmillError(
            expected="a source with `trusted: true` to train the first filter on",
            found=f"none among {', '.join(recipe.sources)}",
            remedy="mark a clean source as trusted, or name published weights and leave first_filter out",
        )
    capfilt.check(recipe)
    for pretraining in filter(None, (recipe.first_filter.clip, recipe.pretrain)):
        preflight(pretraining)
        for weights in filter(None, (pretraining.towers.image.weights, pretraining.towers.text.weights)):
            training_jobs.weights_hash(weights)  # a name or a folder that isn't there is told now
    zero_shot = recipe.evaluate.zero_shot
    if zero_shot and not Path(zero_shot.path).is_dir():
        raise PairmillError(
            expected=f"a folder of classes at {zero_shot.path}, for evaluate.zero_shot",
            found="no such folder",
            remedy="correct evaluate.zero_shot.path (it is relative to where pairmill is called)",
        )


def warn(run: Run) -> None:
    """Says what the recipe may do and shouldn't."""
    for line in capfilt.warnings(run.recipe):
        run.console.say(f"warning: {line}")


def crawl(run: Run) -> Facts:
    """Cuts the first increment of every source, or with `new` the next one. Pins nothing yet. The increment that is
    meant stands in cut.json before it is cut, so that a killed run never cuts two."""
    with run.stage("crawl") as facts:
        cut, space = run.read("cut.json") or {}, run.workspace
        counts, reused = {}, True
        for name, spec in run.recipe.sources.items():
            check_settings(space, name, spec)
            if (meant := cut.get(name)) and (done := finished_cut(space, name, meant)):
                counts[name] = dataclasses.asdict(done)
                continue
            if (name in cut and meant is None) or (space.increments(name) and not run.new):
                continue
            reused = False
            run.write("cut.json", cut := cut | {name: next_increment(space, name)})
            progress = run.console.progress(f"crawl {name}")
            workers = run.recipe.workers
            made = cut_increment(space, name, spec, run.recipe.fetch, progress, run.engine, workers)  # type: ignore[arg-type]
            counts[name] = dataclasses.asdict(made)
            run.write("cut.json", cut := cut | {name: made.increment})
        facts |= {"reused": reused, "sources": counts}
        facts["note"] = ", ".join(f"{name} {c['new']} candidates" for name, c in counts.items())
        return facts


def fetch(run: Run) -> Facts:
    """Makes the missing pair shards of all increments, then pins the run to them."""
    with run.stage("fetch") as facts:
        pinned = (run.read("lineage.json") or {}).get("increments")
        pinned = _holding(run, pinned or {name: run.workspace.increments(name) for name in run.recipe.sources})
        counts = {}
        for name, spec in run.recipe.sources.items():
            fetched = []
            for increment in pinned[name]:
                progress = run.console.progress(f"fetch {name}")
                floor = run.recipe.gates.min_fetch_success
                done = fetch_increment(run.workspace, name, spec, run.recipe.fetch, increment, progress, floor)
                counts[f"{name}/{increment}"] = dataclasses.asdict(done)
                fetched.append(done)
            _success_gate(run, name, fetched)
        run.write("lineage.json", _lineage(run, pinned))
        facts |= {"reused": not any(c["shards"] for c in counts.values()), "sources": counts}
        facts["note"] = (
            f"{sum(c['ok'] for c in counts.values())} pairs of {sum(c['candidates'] for c in counts.values())}"
        )
        return facts


def _holding(run: Run, pinned: dict[str, list[str]]) -> dict[str, list[str]]:
    """What holds the increments now that a run was pinned to, by source."""
    return {name: exactly(run.workspace.increments(name), increments) for name, increments in pinned.items()}


def _success_gate(run: Run, name: str, fetched: list[FetchCounts]) -> None:
    """Of all increments of a source together: one bad increment must not stop every run that comes after it."""
    floor, mark = run.recipe.gates.min_fetch_success, fetch_fingerprint(run.recipe.fetch)
    candidates = sum(done.candidates for done in fetched)
    asked = sum(done.asked for done in fetched)
    success = sum(done.ok for done in fetched) / asked if asked else 0.0
    if candidates and success < floor:
        raise PairmillError(
            expected=f"at least {floor:.0%} of the source {name!r} to be fetched (gates.min_fetch_success)",
            found=f"{success:.1%} of {asked}" if asked else f"nothing asked for: all {candidates} candidates refused",
            remedy=f"look into ledger/{name}-{mark} for the reasons; `--new` later tries what failed for a time again",
        )


def _lineage(run: Run, pinned: dict[str, list[str]]) -> Facts:
    return {
        "increments": pinned,
        "fetch": fetch_fingerprint(run.recipe.fetch),
        "recipe": run.recipe.model_dump(mode="json", by_alias=True),
        "made_by": training_jobs.made_by(),
    }


def shards(run: Run) -> dict[str, list[ShardRef]]:
    """The pair shards that this run is pinned to, by source."""
    lineage = run.read("lineage.json")
    assert lineage, "fetch comes first"
    return {
        name: [r for r in run.workspace.pair_shards(name, lineage["fetch"]) if r.increment in increments]
        for name, increments in _holding(run, lineage["increments"]).items()
    }


def first_filter(run: Run) -> Facts:
    """The models that score round 1: trained on the trusted pairs, as far as the recipe asks for them. A run that looks
    for what is new keeps the scorer in force instead, so that only what is new is scored."""
    spec = run.recipe.first_filter
    if spec.clip is None and spec.blip is None:
        return {"name": "published weights", "models": {}}
    with run.stage("first-filter") as facts:
        if held := scorer.settle(run):
            facts |= {"reused": True, "models": held["models"], "note": f"kept: {held['name']}"}
            return held
        known = {name: refs for name, refs in shards(run).items() if name in run.recipe.trusted}
        selection, records = curation.select_trusted(run, known, {}), []
        everything = shards(run)
        apart = curation.set_apart(run, everything, curation.plant(run, everything), {})
        if spec.clip:
            records.append(training_jobs.pretrain(run, "first-filter/clip", selection, known, spec.clip, apart))
        if spec.blip:
            records.append(training_jobs.train_blip(run, "first-filter/blip", selection, known, spec.blip, apart))
        models = {role: sha for record in records for role, sha in record["models"].items()}
        facts |= {"reused": all(r["reused"] for r in records), "models": models}
        facts["note"] = ", ".join(f"{role} {sha[:12]}" for role, sha in models.items())
        return {"name": "models trained on the trusted pairs", "models": models}


def curate(run: Run, number: int, current: Facts) -> Facts:
    """Scores, reduces, selects and writes the training shards of a round."""
    with run.stage(f"round-{number}/curate") as facts:
        picked = curation.curate(run, number, current, shards(run))
        facts |= {"reused": picked["reused"], "selection": picked["selection"], "note": f"{picked['kept']} pairs kept"}
        run.write(f"round-{number}/curation.json", picked | {"scorer": current})
        return picked


def gates(run: Run, number: int, picked: Facts) -> None:
    """Stops before pretraining where the selection isn't what the recipe asks for."""
    limits = run.recipe.gates
    with run.stage(f"round-{number}/gates") as facts:
        if picked["kept_untrusted"] < limits.min_pairs:
            raise PairmillError(
                expected=f"at least {limits.min_pairs} kept pairs beside the trusted ones (gates.min_pairs)",
                found=f"{picked['kept_untrusted']} in {picked['selection']}",
                remedy="loosen `keep` or the gate; the funnel (funnel.json there) names the rule that drops most",
            )
        told = [_canary_gate(limits.min_canary_recall, picked["canary_recall"])] if limits.min_canary_recall else []
        written: Facts = picked.get("captions") or {"share": 0.0, "told": ""}
        if written["share"] < limits.min_captions:
            raise PairmillError(
                expected=f"captions for at least {limits.min_captions:.0%} of the untrusted pairs (gates.min_captions)",
                found=written["told"] or "no such pairs",
                remedy="train the captioner longer, raise blip_caption.max_tokens where they are endless, or lower it",
            )
        facts["note"] = "; ".join(filter(None, [*told, written["told"]]))


def _canary_gate(wanted: float | dict[str, float], figures: dict[str, Facts]) -> str:
    """A figure that is missing fails too: nobody has measured what the gate asks for. Returns what it passed with."""
    recalls: dict[str, float | None] = {defect: figure["value"] for defect, figure in figures.items()}
    floors = wanted if isinstance(wanted, dict) else dict.fromkeys(recalls, wanted)
    asked = ", ".join(f"{floor:.0%} of {defect}" for defect, floor in floors.items()) or f"{wanted:.0%} of every defect"
    missing = [defect for defect in floors if recalls.get(defect) is None]
    if missing or not floors:
        raise PairmillError(
            expected=f"a canary recall of at least {asked} (gates.min_canary_recall)",
            found=f"no reporting canaries of {', '.join(missing)}" if missing else "no canaries",
            remedy="mark a larger source as trusted (canaries are made of its pairs), raise canaries.per_defect and "
            "canaries.max_fraction, or leave the gate out",
        )
    told = {d: f"{d} {recalls[d]:.1%} of {figures[d]['n']} reporting canaries" for d in floors}
    if low := [d for d, floor in floors.items() if (recalls[d] or 0) < floor]:
        raise PairmillError(
            expected=f"a canary recall of at least {asked} (gates.min_canary_recall)",
            found=", ".join(told[defect] for defect in low),
            remedy="train the filter longer, tighten the rule that should catch this defect, or lower the gate",
        )
    return ", ".join(told.values())


def pretrain(run: Run, number: int, picked: Facts) -> Facts:
    """Trains the round's model on the selection's training shards."""
    with run.stage(f"round-{number}/pretrain") as facts:
        name, spec = f"round-{number}", run.recipe.pretrain
        if spec.objective == "blip":
            spec = capfilt.settled(run, number)
        given = (picked["selection"], shards(run), spec, picked["apart"], picked["scores"])
        record = training_jobs.pretrain(run, name, *given)
        facts |= {"reused": record["reused"], "training": record["fingerprint"]}
        facts["note"] = f"{_trained(record)} of {record['result']['pairs']} pairs"
        return record


def finetune(run: Run, number: int, picked: Facts, record: Facts) -> Facts:
    """The models that serve after the round, by role: the captioner and the match filter that are fine-tuned apart on
    the trusted pairs, where the recipe asks for it; else what was pretrained."""
    if run.recipe.finetune is None:
        return dict(record["models"])
    with run.stage(f"round-{number}/finetune") as facts:
        known = {name: refs for name, refs in shards(run).items() if name in run.recipe.trusted}
        records = capfilt.finetune(run, number, record, known, picked)
        facts |= {"reused": all(r["reused"] for r in records.values())}
        facts["trainings"] = {role: r["fingerprint"] for role, r in records.items()}
        facts["note"] = "; ".join(map(_trained, records.values()))
        return {role: r["models"][role] for role, r in records.items()}


def _trained(record: Facts) -> str:
    models = ", ".join(f"{'model' if role == 'clip' else role} {sha[:12]}" for role, sha in record["models"].items())
    return f"{models} after {record['result']['steps']} steps"


def served(run: Run, number: int, record: Facts, models: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """What of a round is evaluated, by the report's name: the pretrained model, and what is fine-tuned from it."""
    told: dict[str, Mapping[str, str]] = {f"round {number}": record["models"]}
    return told | ({f"round {number}, fine-tuned": models} if run.recipe.finetune else {})


def evaluate(run: Run, number: int, models: Mapping[str, Mapping[str, str]]) -> Facts:
    """Figures of the round's `models`, by what the report calls them: content hashes by role. In round 1 of the first
    filter's too, its BLIP where rounds train one."""
    with run.stage(f"round-{number}/evaluate") as facts:
        first = (run.read(f"round-{number}/curation.json") or {}).get("scorer", {}).get("models", {})
        told = "scorer in force" if scorer.kept(run) else "first filter"
        blip = {role: sha for role, sha in first.items() if role != "clip" and run.recipe.pretrain.objective == "blip"}
        earlier = {told: {"clip": first["clip"]} if "clip" in first else {}, f"{told}'s BLIP": blip}
        models = ({name: roles for name, roles in earlier.items() if roles} if number == 1 else {}) | dict(models)
        known = {name: refs for name, refs in shards(run).items() if name in run.recipe.trusted}
        results = [evaluation.evaluate(run, name, roles, known) for name, roles in models.items()]
        rows = [row for result in results for row in result["rows"]]
        run.write(f"round-{number}/evaluation.json", rows)
        facts |= {"reused": all(result["reused"] for result in results)}
        shown = [row for row in rows if row["figure"] in evaluation.NOTED and row["value"] is not None]
        facts["note"] = ", ".join(f"{row['model']} {row['figure']} {row['value']:.3f}" for row in shown)
        return {"rows": rows}


def rounds(run: Run) -> int:
    """How many rounds the run has: one where the scorer is kept, since another would score and select the same."""
    return 1 if scorer.kept(run) else run.recipe.rounds


def promote(run: Run, number: int, current: Facts, models: Mapping[str, str]) -> Facts:
    """The next round's scorer: in each role this round's model, unless it is worse than the one in force, or the run
    keeps the scorer in force."""
    with run.stage(f"round-{number}/promote") as facts:
        if scorer.kept(run):
            told = "The scorer stays: a run that adds what is new keeps it until `--advance`."
            verdict: Facts = {"promoted": False, "reused": True, "told": told}
        else:
            verdict = promotion.compare(run, number, current, models)
        following = current
        roles: Facts = verdict.get("roles", {})
        if new := {role: models[role] for role, one in roles.items() if one["promoted"]}:
            what = "model" if "clip" in new else " and ".join(new)
            following = {"name": f"the {what} of round {number}", "models": current["models"] | new}
        run.write(f"round-{number}/promotion.json", verdict | {"scorer": following})
        facts |= {"reused": verdict["reused"], "note": verdict["told"]}
        return following


def report(run: Run) -> Facts:
    """Writes report.json and report.html, and returns the summary that the command line prints."""
    from pipelines.report.gather import gather
    from pipelines.report.page import render

    with run.stage("report") as facts:
        told = gather(run)
        run.write("report.json", told)
        path = f"{run.folder}/report.html"
        run.workspace.store.write(path, render(told))
        scorer.record(run)
        facts["note"] = path
    result = summary(run) | {"report": run.workspace.store.full(path)}
    return result | {"rounds": [{"round": r["round"], "funnel": r["funnel"]} for r in told["rounds"]]}


def summary(run: Run) -> Facts:
    """What a run says of itself when it ends."""
    return {"workspace": run.workspace.store.root, "run": run.folder, "reused": run.reused, "rounds": []}
