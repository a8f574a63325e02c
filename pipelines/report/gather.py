"""Gathers what a report says from the workspace: nothing is computed here that isn't written somewhere else already,
except histograms and the choice of samples (by hash of the uid, so the same report comes out twice).
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import yaml

from filters.columns import Frame, load_frame
from filters.rules import numbers
from filters.selection import BEFORE_RULES, rule_columns, steps
from filters.texts import column_names
from pairs.errors import PairmillError
from pairs.recipe import Recipe
from pairs.rules import Rule
from pairs.schemas import SELECTION
from pipelines import capfilt, stages, training_jobs
from pipelines.models import trained
from pipelines.promotion import FIGURES
from pipelines.report import filters
from pipelines.report.samples import Sampler
from pipelines.run import Run

Facts = dict[str, Any]
BINS = 40
CURVE_POINTS = 200


def gather(run: Run) -> Facts:
    """Everything that the report of `run` says, as JSON."""
    rounds = list(_rounds(run))
    evaluation = [row for number in _numbers(run) for row in run.read(f"round-{number}/evaluation.json") or []]
    states = run.read("stages.json") or {}
    recipe = run.recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return {
        "name": run.recipe.name,
        "run": run.folder,
        "workspace": run.workspace.store.root,
        "made_by": training_jobs.made_by(),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True),
        "stages": [_stage(name, facts) for name, facts in sorted(states.items(), key=lambda s: s[1]["started"])],
        "warnings": capfilt.warnings(run.recipe),
        "evaluation": evaluation,
        "rounds": rounds,
    }


def _stage(name: str, facts: Facts) -> Facts:
    """A stage's state; the seconds are those of the time when it had something to do."""
    seconds = facts.get("first_seconds") or facts.get("seconds")
    told = {key: facts.get(key) for key in ("state", "note", "error")}
    return {"name": name, "seconds": seconds} | told


def _numbers(run: Run) -> list[int]:
    return [n for n in range(1, run.recipe.rounds + 1) if run.read(f"round-{n}/curation.json")]


def _rounds(run: Run) -> Iterator[Facts]:
    for number in _numbers(run):
        curated = run.read(f"round-{number}/curation.json")
        store = run.workspace.store
        manifest = json.loads(store.read(f"{curated['selection']}/manifest.json"))
        total = json.loads(store.read(f"{curated['selection']}/funnel.json"))["total"]
        apart, record = curated.get("set_apart", 0), _record(run, number)
        yield {
            "round": number,
            "scorer": curated["scorer"]["name"],
            "selection": curated["selection"],
            "funnel": funnel_rows(total, curated["training_pairs"], apart),
            "adds_up": adds_up(total, curated["training_pairs"], apart) and all_read(record, total, apart),
            "thresholds": [
                {"rule": name, "threshold": t["value"], "high": t.get("high"), "found": t["found"], "now": t["now"]}
                for name, t in manifest["thresholds"].items()
            ],
            "promotion": (promotion := run.read(f"round-{number}/promotion.json") or {}).get("told"),
            "compared": [
                {"role": role, "figure": FIGURES[role], "new": None, "in force": None, **facts}
                for role, facts in promotion.get("roles", {}).items()
            ],
            "captioned": curated.get("captions"),
            **_canaries(curated["canaries"]),
            "filters": filters.rows(run, curated["scores"], [r for refs in stages.shards(run).values() for r in refs]),
            **_measured(run, curated, manifest),
            "training": _training(run, record),
            "finetuning": {role: _training(run, trained(run.workspace, mark)) for role, mark in _tuned(run, number)},
        }


def funnel_rows(total: Facts, training: int, apart: int = 0) -> list[Facts]:
    """The funnel from candidates to training examples, one row a step."""
    left = total["candidates"] if total["candidates"] is not None else total["pairs"]
    rows: list[Facts] = [{"step": "candidates", "dropped": None, "would_drop": None, "left": left}]
    for reason, count in total["fetch"].items():
        if reason != "pair":
            left -= count
            rows.append({"step": f"fetch {reason}", "dropped": count, "would_drop": None, "left": left})
    rows.append({"step": "pairs", "dropped": None, "would_drop": None, "left": total["pairs"]})
    for rule in total["rules"]:
        keys = ("dropped", "would_drop", "left")
        rows.append({"step": rule["name"]} | {key: rule[key] for key in keys})
    if apart:
        rows.append({"step": "canary originals", "dropped": apart, "would_drop": None, "left": total["kept"] - apart})
    rows.append({"step": "training examples", "dropped": None, "would_drop": None, "left": training})
    return rows


def adds_up(total: Facts, training: int, apart: int = 0) -> bool:
    """Whether candidates minus everything that was dropped are the training examples."""
    lost = sum(count for reason, count in total["fetch"].items() if reason != "pair")
    dropped = sum(rule["dropped"] for rule in total["rules"])
    start = total["candidates"] is None or total["candidates"] - lost == total["pairs"]
    return bool(start and total["pairs"] - dropped == total["kept"] == training + apart)


def all_read(record: Facts | None, total: Facts, apart: int) -> bool:
    """Whether what the training says that it read and left out are the kept pairs, where there was a training. What is
    forgotten may have gone before the selection, or after it."""
    if record is None:
        return True
    left_out = record["result"]["left_out"]
    told = record["result"]["pairs"] + sum(left_out.values())
    right = told - left_out.get("forgotten", 0) <= total["kept"] <= told
    return bool(right and left_out.get("canary", 0) == apart)


def _canaries(told: Facts) -> Facts:
    defects = told["defects"].items()
    rules = [{"defect": defect, "n": f["canaries"], **rule} for defect, f in defects for rule in f["rules"]]
    # A score that tells a defect from its twin stands out on either side of 0.5, and has a curve; one curve, one line.
    curves = {(defect, str(a["curve"])): a for defect, f in defects for a in reversed(f["auc"]) if "curve" in a}
    telling = [{"defect": defect, **entry} for (defect, _), entry in curves.items()]
    kinds = [{"defect": defect, **kind} for defect, f in defects if len(f["kinds"]) > 1 for kind in f["kinds"]]
    return {
        "canaries": [r for r in rules if (r["recall"]["value"] or 0) > 0 or r["rule"] == "selection"],
        "auc": sorted(telling, key=lambda a: (a["defect"], -abs(a["auc"]["value"] - 0.5))),
        "kinds": kinds,
        "noise": None if told["trusted"] else [{"defect": defect, "noise": f["noise"]} for defect, f in defects],
    }


def _measured(run: Run, curated: Facts, manifest: Facts) -> Facts:
    """Histograms, samples and captions: what needs the tables of all shards."""
    recipe, store = run.recipe, run.workspace.store
    shards = stages.shards(run)
    wanted = [*rule_columns(recipe.keep), *_shown(recipe), *column_names(recipe.texts), "pairs.text", "pairs.texts"]
    wanted += ["blip_caption.texts"] if "blip_caption" in recipe.filters else []
    frame = load_frame(store, shards, wanted, curated["scores"], recipe.trusted)
    tables = [store.read_table(ref.beside(curated["selection"])).cast(SELECTION) for _, ref in frame.shards]
    sampler = Sampler(store, frame, tables, recipe.keep)
    judged = [name for name in steps(recipe.keep) if name not in BEFORE_RULES]
    return {
        "histograms": [h for name in _shown(recipe) if (h := _histogram(recipe, frame, manifest, name))],
        "samples": [_samples(sampler, recipe, frame, manifest, name) for name in judged],
        **sampler.captions(recipe.texts.at(manifest["thresholds"])),
    }


def _shown(recipe: Recipe) -> list[str]:
    """The columns whose histograms are shown: those of rules and of the texts' match, and the CLIP score."""
    names = [rule.column for rule in recipe.keep if rule.column] + ([recipe.texts.match] if recipe.texts.match else [])
    names += ["clip.cosine"] if "clip" in recipe.filters else []
    return list(dict.fromkeys(names))


def _values(frame: Frame, name: str) -> np.ndarray | None:
    """One number per row, NaN where null; None where the column holds no numbers."""
    try:
        return numbers(frame.table[name], name)
    except PairmillError:
        return None


def _histogram(recipe: Recipe, frame: Frame, manifest: Facts, name: str) -> Facts | None:
    values = _values(frame, name)
    if values is None or not np.isfinite(values).any():
        return None
    seen = values[np.isfinite(values)]
    low, high = np.quantile(seen, [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = [np.histogram(np.clip(values[rows & np.isfinite(values)], edges[0], edges[-1]), edges)[0] for rows in
              (~frame.trusted, frame.trusted)]  # fmt: skip
    limits = [limit for rule in recipe.keep if rule.column == name for limit in _limits(rule, manifest)]
    limits += [recipe.texts.at(manifest["thresholds"]).min] if name == recipe.texts.match else []
    facts = {"column": name, "edges": [float(e) for e in edges], "thresholds": [t for t in limits if low <= t <= high]}
    return facts | {"counts": counts[0].tolist(), "trusted_counts": counts[1].tolist()}


def _limits(rule: Rule, manifest: Facts) -> list[float]:
    """The numbers that a rule compares with, those of its overrides among them."""
    pins = [t for n, t in manifest["thresholds"].items() if n == rule.name or n.startswith(f"{rule.name} at ")]
    ends = [end for case in rule.cases().values() if case for end in (case.min, case.max, *(case.between or ()))]
    ends += [pin.get(end) for pin in pins for end in ("value", "high")]
    return [end for end in ends if end is not None]


def _samples(sampler: Sampler, recipe: Recipe, frame: Frame, manifest: Facts, name: str) -> Facts:
    """Kept, dropped, and nearest to the threshold, for one rule (or for the step `texts`)."""
    rule = next((r for r in recipe.keep if r.name == name), None)
    column = rule.column or rule.best if rule else recipe.texts.match
    values = _values(frame, column) if column else None
    limit = next(iter(_limits(rule, manifest)), None) if rule else None
    if rule is None and name == "texts" and recipe.texts.match:
        limit = recipe.texts.at(manifest["thresholds"]).min
    return {"rule": name} | sampler.of_rule(name, values, limit)


def _record(run: Run, number: int) -> Facts | None:
    facts = (run.read("stages.json") or {}).get(f"round-{number}/pretrain", {})
    return trained(run.workspace, facts["training"]) if "training" in facts else None


def _tuned(run: Run, number: int) -> Iterable[tuple[str, str]]:
    """Role and fingerprint of the round's fine-tunings."""
    facts: Facts = (run.read("stages.json") or {}).get(f"round-{number}/finetune", {})
    return facts.get("trainings", {}).items()


def _training(run: Run, record: Facts | None) -> Facts | None:
    if not record:
        return None
    path = f"{record['folder']}/metrics.jsonl"
    store, result, curve = run.workspace.store, record["result"], []
    if store.has(path):
        lines = [json.loads(line) for line in store.read(path).decode().splitlines()]
        by_step = {line["step"]: line["loss"] for line in lines if line.get("loss") is not None}
        every = max(1, len(by_step) // CURVE_POINTS)
        curve = [[step, loss] for step, loss in sorted(by_step.items())][::every]
    told = {key: result[key] for key in ("steps", "pairs", "truncated", "pairs_per_s", "fill")}
    told |= {"batch_pairs": record["train_config"]["spec"]["batch_pairs"], "last_loss": result["loss"]}
    return told | {"loss": curve, "model": ", ".join(record["models"].values())}
