"""SIGKILL of a fetch's whole process group: at random wall times, a third of them while a file is being written.

    python benchmarks/fetch_kills.py FOLDER [--images 5000] [--kills 10] [--seed 1]

A fetch of the same images runs once without a kill, then in another workspace with kills, each followed by the same
command. Then: every shard and table of pairs has equal bytes; no image that had been published was asked for again
(nginx's log); no candidate is without its row, no image lost. A write is caught by its temporary name, from outside.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from nginx_web import asked, draw, nginx, write_candidates

from pairs.recipe import FetchSpec, SourceSpec
from pairs.store import TEMPORARY
from pairs.verify import verify
from pairs.workspace import Workspace
from pipelines.fetch.shards import fetch_increment

PORT = 8798
SOURCE = SourceSpec(kind="urls", allow=["127.0.0.0/8"], path="unused.jsonl")
PATIENCE_S = 120.0


def fetch(folder: Path, images: int) -> None:
    """The child: under the lock, as a run does it."""
    spec = FetchSpec(side_px=128, shard_pairs=max(10, images // 40), per_host=16)
    workspace = Workspace.open(folder)
    with workspace.lock():
        done = fetch_increment(workspace, "web", SOURCE, spec, "0000", lambda *_: None)
    assert done.ok == done.candidates == images, done


def start(folder: Path, images: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, str(folder), "--images", str(images), "--child"]
    return subprocess.Popen(command, start_new_session=True)


def kill(folder: Path, log: Path, images: int, chance: random.Random, within: bool) -> str:
    """Starts the fetch and ends it; says where."""
    child, size, until = start(folder, images), log.stat().st_size, time.monotonic() + PATIENCE_S
    when, found, kind = chance.uniform(0.0, 2.0), "at a random time", chance.choice(("pairs", "pairs", "ledger"))
    while not asked(log, size) and child.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    moment = time.monotonic() + when
    while child.poll() is None and time.monotonic() < (until if within else moment):
        writes = [entry.path for entry in writing(folder, kind)] if within else []
        if writes:
            found = f"inside {Path(writes[0]).parent.relative_to(folder)}"
            break
        time.sleep(0.0 if within else 0.005)
    if child.poll() is not None:
        return "after the end"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    return found


def writing(folder: Path, kind: str) -> "list[os.DirEntry[str]]":
    """Unfinished files of `kind` (pairs or ledger)."""
    return [
        entry
        for place in folder.glob(f"{kind}/*/0000")
        for entry in os.scandir(place)
        if entry.name.startswith(TEMPORARY)
    ]


def published(workspace: Workspace) -> set[str]:
    tables = [workspace.store.read_table(path, ["url"]) for path in workspace.store.files("pairs", ".parquet")]
    return {"/" + url.rpartition("/")[2] for table in tables for url in table["url"].to_pylist()}


def contents(workspace: Workspace) -> dict[str, bytes]:
    return {path: workspace.store.read(path) for path in workspace.store.files("pairs")}


def compare(folder: Path, log: Path, images: int, kills: int, seed: int) -> None:
    for name in ("whole", "killed"):
        shutil.rmtree(folder / name, ignore_errors=True)
    whole, killed = (write_candidates(folder / name, PORT, images) for name in ("whole", "killed"))
    assert start(folder / "whole", images).wait() == 0
    chance, repeated = random.Random(seed), 0
    for number in range(kills + 1):
        before, size = published(killed), log.stat().st_size
        if number < kills:
            place = kill(folder / "killed", log, images, chance, within=number % 3 == 2)
        else:
            place = "to its end"
            assert start(folder / "killed", images).wait() == 0
        again = before & {path for _, path in asked(log, size)}
        repeated += len(again)
        print(
            f"{number + 1}: {place}; {len(published(killed))} images published, {len(again)} asked for again",
            flush=True,
        )
    same, checked = contents(whole) == contents(killed), verify(killed)
    lost = images - len(published(killed))
    print(f"equal bytes: {same}; repeated: {repeated}; lost: {lost}; verify: {checked.problems or 'ok'}")
    sys.exit(not (same and not repeated and not lost and checked.ok))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return fetch(given.folder, given.images)
    draw(given.folder, given.images)
    with nginx(given.folder, PORT) as log:
        compare(given.folder.resolve(), log, given.images, given.kills, given.seed)


if __name__ == "__main__":
    main()
