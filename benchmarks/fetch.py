"""Images a second of the guarded fetch against img2dataset's own command, on the same nginx and the same images.

    python benchmarks/fetch.py FOLDER [--images 2000 10000 50000] [--repeats 3]

Both resize to 256 px on the longer side, JPEG quality 92, into WebDataset tars with tables. img2dataset runs with a
process per core, 64 threads each, and shards that keep all of them busy. In each repeat both run, in turns. Cold: from
the start of the command to its end. Warm: from its first image asked for (nginx's log) to its end, so without imports
and the start of workers; all checks of ours are in both. Memory: peak PSS of the process tree.
Writes FOLDER/fetch.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from memory import pss_bytes
from nginx_web import asked, draw, nginx, write_candidates

from pairs.recipe import FetchSpec, SourceSpec
from pairs.workspace import Workspace
from pipelines.fetch.shards import fetch_increment

PORT = 8797
CORES = len(os.sched_getaffinity(0))
SPEC = FetchSpec(side_px=256, quality=92, per_host=64, connections=64)
SOURCE = SourceSpec(kind="urls", allow=["127.0.0.0/8"], path="unused.jsonl")
SHARD = 10_000


def fetch_ours(folder: str, shard: int) -> None:
    """The command's child: one increment."""
    spec = SPEC.model_copy(update={"shard_pairs": shard})
    done = fetch_increment(Workspace.open(folder), "web", SOURCE, spec, "0000", lambda *_: None)
    assert done.ok == done.candidates, done


def theirs(urls: Path, out: Path, shard: int) -> list[str]:
    """img2dataset's command at its fastest documented settings."""
    settings = {
        **{"url_list": urls, "input_format": "parquet", "url_col": "url", "caption_col": "text", "output_folder": out},
        **{"output_format": "webdataset", "image_size": 256, "resize_mode": "keep_ratio_largest"},
        **{"resize_only_if_bigger": True, "encode_quality": 92, "processes_count": CORES, "thread_count": 64},
        **{"number_sample_per_shard": shard, "enable_wandb": False},
    }
    return [
        str(Path(sys.executable).parent / "img2dataset"),
        *(f"--{name}={value}" for name, value in settings.items()),
    ]


def measure(command: list[str], log: Path, output: Path, count: int) -> dict[str, float]:
    """Runs `command` to its end; images/s cold and warm, and peak memory."""
    start, peak, began = log.stat().st_size, 0, time.time()
    with output.open("wb") as told:
        environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"}
        child = subprocess.Popen(command, stdout=told, stderr=told, env=environment)
        tree = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, pss_bytes(tree))
            time.sleep(0.5)
    ended, seen = time.time(), asked(log, start)
    assert child.returncode == 0 and len(seen) >= count, f"{child.returncode}, {len(seen)} asked: see {output}"
    first = min(at for at, _ in seen)
    return {"cold": count / (ended - began), "warm": count / (ended - first), "peak_mb": peak / 1e6}


def compare(folder: Path, log: Path, count: int, repeats: int) -> dict[str, Any]:
    shard = min(SHARD, -(-count // CORES))
    found: dict[str, list[dict[str, float]]] = {"pairmill": [], "img2dataset": []}
    urls = folder / "urls.parquet"
    rows = [{"url": f"http://127.0.0.1:{PORT}/{n:05d}.jpg", "text": f"picture {n:05d}"} for n in range(count)]
    pq.write_table(pa.Table.from_pylist(rows), urls)
    for _ in range(repeats):
        for name, runs in found.items():
            out = folder / name
            shutil.rmtree(out, ignore_errors=True)
            if name == "pairmill":
                write_candidates(out, PORT, count)
                command = [sys.executable, __file__, str(out), "--ours", str(shard)]
            else:
                command = theirs(urls, out, shard)
            runs.append(measure(command, log, folder / f"{name}.log", count))
            made = sum(
                pq.read_metadata(path).num_rows
                for path in out.rglob("*.parquet")
                if "pairs" in str(path) or name != "pairmill"
            )
            assert made == count, f"{name}: {made} of {count}"
    return {name: {key: spread([run[key] for run in runs]) for key in runs[0]} for name, runs in found.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 10_000, 50_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours", type=int, metavar="SHARD_PAIRS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ours:
        return fetch_ours(str(given.folder), given.ours)
    draw(given.folder, max(given.images))
    figures: dict[str, Any] = {"cores": CORES, "repeats": given.repeats}
    with nginx(given.folder, PORT) as log:
        for count in given.images:
            figures[str(count)] = found = compare(given.folder, log, count, given.repeats)
            for name, values in found.items():
                told = ", ".join(f"{k} {v['median']:.0f} ({v['min']:.0f} to {v['max']:.0f})" for k, v in values.items())
                print(f"{count} images, {name}: {told}", flush=True)
    (given.folder / "fetch.json").write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
