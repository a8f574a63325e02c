"""SIGKILL of a run's whole process group at random wall times, then the same command, until it is done: is anything
lost, repeated or different?

    python benchmarks/kills.py FOLDER [--kills 12] [--seed 1]

Draws a small demo web in FOLDER, runs the recipe once without a kill, then in another workspace with kills spread over
crawl, fetch, curate and pretrain (each at a random time after its stage has begun), and compares: pair shards, score
tables, selections and training shards byte by byte; the uids of every training step; leftover processes.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

from pipelines.demo.server import running_server
from pipelines.demo.web import make_web

PORT = 8793
PATIENCE_S = 10.0  # in which every process of a killed run has to be gone
STAGES = ("crawl", "fetch", "curate", "pretrain")
COMPARED = ("candidates", "pairs", "scores", "canaries", "selections", "shards")


def write_recipe(folder: Path) -> Path:
    """The demo recipe, small: one round, few steps, many shards."""
    recipe = yaml.safe_load(Path("recipes/demo.yaml").read_text())
    recipe["sources"]["web"]["seeds"] = [f"http://127.0.0.11:{PORT}/"]
    recipe["sources"]["web"]["delay_s"] = 0.02
    recipe["sources"]["trusted"]["path"] = str(folder / "web/trusted")
    recipe["evaluate"]["zero_shot"]["path"] = str(folder / "web/eval")
    recipe["fetch"] |= {"shard_pairs": 40, "deadline_s": 3, "attempts": 1}
    recipe["first_filter"]["clip"] |= {"steps": 10, "batch_pairs": 32, "checkpoint_every": 5}
    recipe["first_filter"]["blip"] = {"word_steps": 5, "caption_steps": 5, "match_steps": 5, "batch_pairs": 16}
    recipe["pretrain"] |= {"steps": 120, "batch_pairs": 32, "checkpoint_every": 10}
    recipe["texts"]["min"] = 0.2
    recipe["gates"] = {"min_pairs": 0}
    recipe["rounds"] = 1
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def start(recipe: Path, space: Path) -> "subprocess.Popen[bytes]":
    command = [str(Path(sys.executable).parent / "pairmill"), "run", str(recipe), "--workspace", str(space)]
    log = (space.parent / f"{space.name}.log").open("ab")
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def stages(space: Path) -> dict[str, Any]:
    files = sorted(space.glob("runs/*/stages.json"))
    try:
        return json.loads(files[-1].read_text()) if files else {}
    except (OSError, json.JSONDecodeError):
        return {}


def kill_in(stage: str, recipe: Path, space: Path, typical_s: float, draw: random.Random) -> dict[str, Any] | None:
    """Starts the run, waits until `stage` runs and a random share of its typical time has passed, kills the group."""
    process = start(recipe, space)
    began = time.monotonic()
    while process.poll() is None:
        facts = next((f for name, f in stages(space).items() if name.endswith(stage)), {})
        if facts.get("state") == "running" and facts.get("process") == process.pid:
            break
        time.sleep(0.05)
    time.sleep(draw.uniform(0, typical_s))
    if process.poll() is not None:
        return None
    group = [p.pid for p in psutil.process_iter() if _in_session(p.pid, process.pid)]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    after_s, killed = round(time.monotonic() - began, 2), time.monotonic()
    while (left := _alive(group)) and time.monotonic() < killed + PATIENCE_S:
        time.sleep(0.1)
    gone_s = round(time.monotonic() - killed, 1)
    return {"stage": stage, "after_s": after_s, "all_gone_after_s": gone_s, "left_behind": left}


def _alive(pids: list[int]) -> list[str]:
    """The command lines of those that run."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            found += [" ".join(process.cmdline())[:120]] if process.status() != psutil.STATUS_ZOMBIE else []
    return found


def _in_session(pid: int, leader: int) -> bool:
    """Whether the process descends from the run, in its session or not (Ray's daemons open their own)."""
    try:
        process = psutil.Process(pid)
        return pid == leader or leader in [parent.pid for parent in process.parents()] or os.getsid(pid) == leader
    except (psutil.Error, OSError):
        return False


def digest(space: Path) -> dict[str, str]:
    """sha256 of every file that has to be the same."""
    files = [p for kind in COMPARED for p in sorted((space / kind).rglob("*")) if p.is_file() and ".tmp-" not in p.name]
    return {str(p.relative_to(space)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def consumed(space: Path) -> dict[str, str]:
    """The hash of the uids of each training step, by run and step (a step that was done twice has to agree)."""
    found: dict[str, str] = {}
    for path in sorted(space.glob("runs/*/round-*/*/metrics.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            key = f"{path.parent.parent.name}/{line['step']}"
            assert found.get(key, line["uids_sha256"]) == line["uids_sha256"], (
                f"step {key} took other pairs the second time"
            )
            found[key] = line["uids_sha256"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    make_web(folder / "web", seed=31, noise=0.3, scenes=300, trusted=200, port=PORT)
    recipe, draw, kills = write_recipe(folder), random.Random(arguments.seed), []
    with running_server(folder / "web", PORT):
        assert start(recipe, folder / "whole").wait() == 0, "the run without a kill failed"
        typical = {
            stage: next(f["seconds"] for n, f in stages(folder / "whole").items() if n.endswith(stage))
            for stage in STAGES
        }
        for number in range(arguments.kills):
            stage = STAGES[number * len(STAGES) // arguments.kills]
            kill = kill_in(stage, recipe, folder / "killed", typical[stage], draw)
            kills += [kill] if kill else []
            print(kill or f"{stage} had ended before the kill", flush=True)
        assert start(recipe, folder / "killed").wait() == 0, "the run after the kills failed"
    whole, killed = digest(folder / "whole"), digest(folder / "killed")
    differing = sorted(name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name))
    steps = consumed(folder / "whole"), consumed(folder / "killed")
    print(json.dumps({"kills": kills, "files": len(whole), "differing": differing,
                      "steps": len(steps[0]), "same_uids_in_every_step": steps[0] == steps[1]}, indent=1))  # fmt: skip
    if differing or steps[0] != steps[1] or any(kill["left_behind"] for kill in kills):
        sys.exit("the killed run isn't the whole one, or a process was left behind")


if __name__ == "__main__":
    main()
