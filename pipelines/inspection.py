"""What `verify`, `trace`, `ls` and `status` print: the workspace as it lies on disk, read only.

Each function gathers plain facts first (that is what `--json` prints) and lays them out for a person second.
"""

import json
from typing import Any

import psutil
import pyarrow.compute as pc
from rich.console import Console as Rich
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from filters.score_tables import MADE_WITH, errors_of
from pairs.errors import PairmillError
from pairs.shard import ShardRef, list_shards
from pairs.verify import verify
from pairs.workspace import Workspace
from pipelines.console import printable
from pipelines.training_trace import trainings

_out = Rich(highlight=False)
SAME_START_S = 1.0  # a start time is told in ticks of the clock


def tell_verdict(workspace: Workspace, as_json: bool) -> int:
    """Prints what `verify` found; returns the exit code."""
    with _out.status("verifying") as bar:
        verdict = verify(workspace, lambda path: bar.update(f"verifying {path}"))
    if as_json:
        facts = {"ok": verdict.ok, "checked": verdict.checked, "unfinished": verdict.unfinished}
        print(json.dumps(facts | {"problems": [{"path": p, "problem": w} for p, w in verdict.problems]}))
        return 0 if verdict.ok else 2
    _out.print("checked " + ", ".join(f"{n} {what}" for what, n in verdict.checked.items()), markup=False)
    if verdict.unfinished:
        _out.print(
            f"{len(verdict.unfinished)} unfinished tars and folders: a killed run left them, the next one makes them"
        )
    for path, problem in verdict.problems:
        _out.print(printable(f"WRONG {path}: {problem}"), markup=False)
    if verdict.ok:
        _out.print("all is as recorded")
    else:
        advice = "delete the named table and its tar, then run the recipe again: what is missing is made anew"
        _out.print(f"{len(verdict.problems)} problems; {advice}")
    return 0 if verdict.ok else 2


def contents(workspace: Workspace) -> dict[str, Any]:
    """What lies where, counted."""
    store = workspace.store

    def groups(kind: str) -> dict[str, int]:
        return {name: len(store.files(f"{kind}/{name}", ".parquet")) for name in store.folders(kind)}

    shards = list_shards(store, "pairs")
    rows = {ref: store.read_table(ref.table, ["uid"]).num_rows for ref in shards}
    return {
        "sources": {name: {"increments": workspace.increments(name)} for name in store.folders("candidates")},
        "pairs": {
            group: {
                "shards": sum(r.group == group for r in shards),
                "rows": sum(n for r, n in rows.items() if r.group == group),
            }
            for group in sorted({r.group for r in shards})
        },
        **{kind: groups(kind) for kind in ("scores", "selections", "shards", "canaries")},
        "models": [name for name in store.folders("models") if len(name) == 64],
        "runs": store.folders("runs"),
        "tombstones": sum(map(len, workspace.tombstones().values())),
    }


def tell_contents(workspace: Workspace, as_json: bool) -> None:
    facts = contents(workspace)
    if as_json:
        print(json.dumps(facts))
        return
    tree = Tree(escape(workspace.store.root))
    for kind, holds in facts.items():
        branch = tree.add(f"[bold]{kind}[/bold]")
        _grow(branch, holds if isinstance(holds, dict | list) else [holds])
    _out.print(tree)


def status(workspace: Workspace) -> list[dict[str, Any]]:
    """One entry per run: its stages in order, and how to go on."""
    runs = []
    for name in workspace.store.folders("runs"):
        path = f"runs/{name}/stages.json"
        stages = json.loads(workspace.store.read(path)) if workspace.store.has(path) else {}
        for facts in stages.values():
            if facts["state"] == "running" and not _alive(facts):
                facts["state"] = "killed"
        order = sorted(stages.items(), key=lambda item: item[1]["started"])
        runs.append({"run": name, "stages": dict(order), "next": _advice(name, dict(order))})
    return runs


def _alive(facts: dict[str, Any]) -> bool:
    """Whether the process that recorded the stage still runs: its id, and since when, or the id is another's by now."""
    try:
        started = psutil.Process(facts["process"]).create_time()
    except (KeyError, psutil.Error):
        return False
    return bool(abs(started - facts.get("process_started", started)) < SAME_START_S)


def _advice(run: str, stages: dict[str, Any]) -> str:
    states = [facts["state"] for facts in stages.values()]
    if "running" in states:
        return "it is running; wait, or end that process"
    if "failed" in states or "killed" in states:
        return f"run the same command again (its recipe is runs/{run}/recipe.yaml): it goes on where it stopped"
    if "report" in stages:
        return f"done; open runs/{run}/report.html"
    return f"run `pairmill run` with runs/{run}/recipe.yaml to go further"


def tell_status(workspace: Workspace, as_json: bool) -> None:
    runs = status(workspace)
    if as_json:
        print(json.dumps(runs))
        return
    if not runs:
        _out.print("no run yet: `pairmill run RECIPE`")
    for run in runs:
        table = Table(
            title=escape(run["run"]), title_justify="left", caption=escape(run["next"]), caption_justify="left"
        )
        for column in ("stage", "state", "seconds", "what"):
            table.add_column(column, justify="right" if column == "seconds" else "left")
        for name, facts in run["stages"].items():
            what = facts.get("error") or facts.get("note") or ""
            seconds = f"{facts['seconds']:.1f}" if "seconds" in facts else ""
            table.add_row(name, facts["state"], seconds, _shown(str(what)))
        _out.print(table)


def trace(workspace: Workspace, uid: str) -> dict[str, Any]:
    """Everything the workspace knows of the pair whose uid begins with `uid`."""
    ref, row, full = _find(workspace, uid)
    store = workspace.store
    pair = _row(workspace, ref.table, row)
    if pair["status"] == "ok" and not workspace.alive(store.read_table(ref.table).slice(row, 1))[0]:
        raise PairmillError(
            expected="a pair that isn't forgotten, or one that is gone from all files",
            found=f"a tombstone of {full}, and files that still hold it",
            remedy="run `pairmill forget` on this workspace: it takes out what is left",
        )
    facts: dict[str, Any] = {"uid": full, "shard": ref.tar, "row": row, "pair": pair}
    key = pair["url_key"]
    source = ref.group.rsplit("-", 1)[0]
    facts["candidate"] = _by_key(workspace, f"candidates/{source}", key)
    facts["fetch"] = _by_key(workspace, f"ledger/{ref.group}", key)
    if again := _by_key(workspace, f"tries/{ref.group}", key):  # in each of the increments that were merged
        facts["tries"] = again
    for kind in ("scores", "selections"):
        tables = {name: ref.beside(f"{kind}/{name}") for name in store.folders(kind)}
        facts[kind] = {name: _row(workspace, path, row) for name, path in tables.items() if store.has(path)}
    for name, values in facts["scores"].items():
        schema = store.read_table(ref.beside(f"scores/{name}"), ["uid"]).schema
        told = [why for why, rows in errors_of(schema).items() if row in rows]
        facts["scores"][name] = values | _made_with(workspace, name) | ({"error": told[0]} if told else {})
    facts["training"] = trainings(workspace, full)
    return facts


def _find(workspace: Workspace, uid: str) -> tuple[ShardRef, int, str]:
    """Shard, row and whole uid of the one pair that is meant."""
    places: dict[str, tuple[ShardRef, int, str]] = {}
    for ref in list_shards(workspace.store, "pairs"):
        uids = workspace.store.read_table(ref.table, ["uid"])["uid"].combine_chunks()
        for row in pc.indices_nonzero(pc.starts_with(uids, pattern=uid)).to_pylist():
            places[uids[row].as_py()] = (ref, row, uids[row].as_py())
    if len(places) != 1:
        raise PairmillError(
            expected=f"one pair whose uid begins with {uid!r}",
            found=f"{len(places)} in the pair tables of this workspace",
            remedy="give more digits" if places else "take the uid from a report, a table or a tar's member name",
        )
    return next(iter(places.values()))


def _row(workspace: Workspace, path: str, row: int) -> dict[str, Any]:
    return dict(workspace.store.read_table(path).slice(row, 1).to_pylist()[0])


def _by_key(workspace: Workspace, prefix: str, key: str) -> list[dict[str, Any]]:
    rows = []
    for path in workspace.store.files(prefix, ".parquet"):
        table = workspace.store.read_table(path)
        rows += table.filter(pc.field("url_key") == key).to_pylist()
    return rows


def _made_with(workspace: Workspace, name: str) -> dict[str, Any]:
    """The model that made a folder of score tables, where one did."""
    path = f"scores/{name}/{MADE_WITH}"
    return {"made_with": json.loads(workspace.store.read(path))} if workspace.store.has(path) else {}


def tell_trace(workspace: Workspace, uid: str, as_json: bool) -> None:
    facts = trace(workspace, uid)
    if as_json:
        print(json.dumps(facts, default=str))
        return
    tree = Tree(f"[bold]{escape(facts['uid'])}[/bold]  {facts['shard']} row {facts['row']}")
    for name in ("candidate", "fetch", "tries", "pair", "scores", "selections", "training"):
        _grow(tree.add(name), facts.get(name, []))
    _out.print(tree)


def _shown(text: str) -> str:
    return escape(printable(text))


def _grow(branch: Tree, value: Any) -> None:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    for name, item in entries:
        long_list = isinstance(item, list) and len(item) > 16 and not isinstance(item[0], dict)
        if isinstance(item, dict | list) and item and not long_list:
            _grow(branch.add(_shown(str(name))), item)
        elif item is not None:
            told = f"[{len(item)} values]" if long_list else str(item)
            branch.add(_shown(f"{name}: {told[:300]}"))
