"""Which trainings consumed a pair, and in which steps: what `trace` says of models, made again from the tables.

A CLIP's or a BLIP's plan is made anew; the small BLIP of the first filter draws from its pairs in the order of their
uids. Where either isn't what was trained by any more, no step is named, and why. Of a million pairs a step takes
33 ms.
"""

import json
from typing import Any

from pairs.identity import held_out
from pairs.shard import ShardRef
from pairs.workspace import Workspace
from training.config import BlipJob, Pin, TrainConfig
from training.plan import taken
from training.tables import make_plan, pinned_path

Facts = dict[str, Any]


def trainings(workspace: Workspace, uid: str) -> list[Facts]:
    """Each finished training that had the pair to read, with the steps (from 0) whose batch held it: a list, or lists
    by stage."""
    rows = []
    for path in workspace.store.files("models/index", ".json"):
        record = json.loads(workspace.store.read(path))
        given = record.get("train_config") or record.get("blip_job")
        if given is None or not _holds(workspace, [Pin(**pin) for pin in given["shards"]], uid):
            continue
        models = record["models"]
        told = {"training": record["folder"]} | ({"model": models["clip"]} if "clip" in models else {"models": models})
        if uid in given["apart"]:
            rows.append(told | {"steps": [], "note": "set apart: canaries are made from it"})
        elif found := (_planned if "train_config" in record else _drawn)(workspace, record, given, uid):
            rows.append(told | found)
    return rows


def _holds(workspace: Workspace, pins: list[Pin], uid: str) -> bool:
    paths = (pinned_path(workspace.store, pin) for pin in pins)
    return any(uid in workspace.store.read_table(path, ["uid"])["uid"].to_pylist() for path in paths)


def _planned(workspace: Workspace, record: Facts, given: Facts, uid: str) -> Facts:
    config = TrainConfig(store=workspace.store.root, out_dir="", **given)
    plan, left_out = make_plan(workspace.store, config.shards, config.spec, config.apart)
    if plan.fingerprint != record["result"]["plan"]:
        return _unknown(left_out.get("forgotten", 0) - record["result"]["left_out"].get("forgotten", 0))
    steps = [step for step, _ in taken(plan, {uid}, config.spec.steps)]
    return {"steps": steps} if steps else {}


def _drawn(workspace: Workspace, record: Facts, given: Facts, uid: str) -> Facts:
    """Of the small BLIP. Pictures that it couldn't decode aren't known by name, and pair shards that were merged have
    only their uids left."""
    if held_out(uid):
        return {}
    job, result = BlipJob(store=workspace.store.root, out_dir="", **given), record["result"]
    if result["left_out"].get("undecodable") or not all(workspace.store.has(pin.ref.table) for pin in job.shards):
        return {"steps": [], "note": "its steps can't be told: pictures were left out, or its shards merged since"}
    usable = sorted(
        u for pin in job.shards for u in _read(workspace, pin.ref) if u not in job.apart and not held_out(u)
    )
    if len(usable) != result["pairs"]:
        return _unknown(result["pairs"] - len(usable))
    if uid not in usable:
        return {}
    from training.blip import drawn  # transformers: seconds

    return {"steps": drawn(job.spec, len(usable), usable.index(uid))}


def _read(workspace: Workspace, ref: ShardRef) -> list[str]:
    table = workspace.store.read_table(ref.table, ["uid", "url_key", "status", "text"])
    rows = zip(workspace.alive(table), table["uid"].to_pylist(), table["text"].to_pylist(), strict=True)
    return [uid for living, uid, text in rows if living and (text or "").strip()]


def _unknown(gone: int) -> Facts:
    why = f"{gone} of its pairs were forgotten" if gone > 0 else "another version of pairmill made it"
    return {"steps": [], "note": f"its steps can't be told: the plan can't be made again since {why}"}
