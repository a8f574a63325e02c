"""Near duplicates at scale: `python benchmarks/near_duplicates.py [--rows 100000 1000000 4000000] [--radius 4 6 8]
[--peer PYTHON]`. Prints Markdown tables.

Hashes of chance; in a fifth the first and last two rows of 8 bits are blank, as in pictures on white. A tenth are
planted: copies of others with up to radius + 2 bits turned. One value holds 5 % of the rows. Every count of rows and
radius runs in a process of its own, through the reducer; its time is the reduction's, its memory the process's
greatest, interpreter and libraries included (before: what it was when the reduction began).
A sample of rows is checked by brute force: whether the answer is the earliest leader near, or no leader before is.
Growth is the exponent of the time: 1 is linear. imagededup (its own environment: benchmarks/peers/imagededup.txt) looks
for the same pairs at the same radius in 10,000 hashes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHARE_OF_ONE, PLANTED, ON_WHITE, SAMPLE = 0.05, 0.1, 0.2, 500
PEER_ROWS = 10_000
PEER = """
import json, sys, time
from imagededup.methods import PHash
codes, told = json.load(open(sys.argv[1])), {}
for method in ("bktree", "brute_force_cython"):
    began = time.perf_counter()
    found = PHash(verbose=False).find_duplicates(
        encoding_map=codes, max_distance_threshold=int(sys.argv[2]), search_method=method
    )
    told[method] = time.perf_counter() - began
json.dump({"seconds": told, "pairs": found}, open(sys.argv[3], "w"))
"""


def planted(rows: int, radius: int) -> np.ndarray:
    """(N,) uint64."""
    chance = np.random.default_rng(rows + radius)
    values = chance.integers(0, 2**64, rows, dtype=np.uint64)
    values[chance.random(rows) < ON_WHITE] &= np.uint64(0x0000FFFFFFFF0000)
    copies = chance.choice(rows, int(PLANTED * rows), replace=False)
    turned = np.uint64(1) << chance.integers(0, 64, (len(copies), radius + 2), dtype=np.uint64)
    turned *= np.arange(radius + 2) < chance.integers(0, radius + 3, (len(copies), 1))
    values[copies] = chance.choice(values, len(copies)) ^ np.bitwise_xor.reduce(turned, axis=1)
    values[chance.choice(rows, int(SHARE_OF_ONE * rows), replace=False)] = values[0]
    return values


def measure(rows: int, radius: int) -> dict[str, Any]:
    """One reduction, checked."""
    import pyarrow as pa

    from filters.near_duplicates import NearDuplicates
    from filters.parts import nothing

    reducer = NearDuplicates(max_distance=radius, confirm=None)
    values = planted(rows, radius)
    digits = values.astype(">u8").view(np.uint8).tobytes().hex()
    text = pa.array([digits[place : place + 16] for place in range(0, len(digits), 16)])
    uids = pa.array([f"{row:032x}" for row in range(rows)])
    one = pa.repeat(pa.scalar("0000"), rows)
    table = pa.table({"uid": uids, "increment": one, "trusted": pa.repeat(False, rows), reducer.hash: text})
    del digits, text, uids
    before = peak_mb()
    began, worked = time.perf_counter(), time.process_time()
    answers = reducer.reduce(nothing(reducer, table, own=True), table)
    told = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - worked, "before_mb": before}
    told |= {"mb": peak_mb()}
    leader = np.array([int(group, 16) for group in answers["group"].to_pylist()])
    return told | {"joined": int((leader != np.arange(rows)).sum()), "wrong": wrong(values, leader, radius)}


def peak_mb() -> int:
    """The greatest resident memory of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10


def wrong(values: np.ndarray, leader: np.ndarray, radius: int) -> int:
    """Rows of a sample whose leader isn't the earliest one near; half of the sample are rows that joined one."""
    chance, rows = np.random.default_rng(0), np.arange(len(values))
    leads = leader == rows
    sample = np.concatenate([chance.choice(rows, SAMPLE // 2), chance.choice(rows[~leads], SAMPLE // 2)])
    count = 0
    for row in sample:
        near = leads[:row] & (np.bitwise_count(values[:row] ^ values[row]) <= radius)
        count += int((int(np.argmax(near)) if near.any() else row) != leader[row])
    return count


def peer(python: str, radius: int) -> tuple[float, dict[str, float], bool]:
    """Seconds of both for all pairs within the radius (theirs by method), and whether they find the same ones."""
    from filters.hamming import HammingIndex

    values = planted(PEER_ROWS, radius)
    began = time.perf_counter()
    found = HammingIndex(values[:, None]).within(values[:, None], radius)
    near = np.unique(np.concatenate([asking * PEER_ROWS + rows for asking, rows in found]))
    ours_s = time.perf_counter() - began
    near = near[near // PEER_ROWS != near % PEER_ROWS]
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.json")
        Path(folder, "codes.json").write_text(json.dumps({str(row): f"{v:016x}" for row, v in enumerate(values)}))
        command = [python, "-c", PEER, f"{folder}/codes.json", str(radius), str(told)]
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ""}, **silent)
        theirs = json.loads(told.read_text())
    pairs = sorted(int(a) * PEER_ROWS + int(b) for a, others in theirs["pairs"].items() for b in others)
    return ours_s, theirs["seconds"], pairs == near.tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 4_000_000])
    parser.add_argument("--radius", type=int, nargs="+", default=[4, 6, 8])
    parser.add_argument("--peer")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if given.one:
        print(json.dumps(measure(given.rows[0], given.radius[0])))
        return
    print("| rows | radius | joined | s | CPU s | MB (before) | growth | wrong of the sample |\n" + "| --- " * 8 + "|")
    for radius in given.radius:
        last: tuple[int, float] | None = None
        for rows in given.rows:
            command = [sys.executable, __file__, "--one", "--rows", str(rows), "--radius", str(radius)]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            growth = f"{np.log(told['seconds'] / last[1]) / np.log(rows / last[0]):.2f}" if last else ""
            last = (rows, told["seconds"])
            times = f"{told['seconds']:.1f} | {told['cpu_s']:.1f} | {told['mb']} ({told['before_mb']})"
            print(f"| {rows:,} | {radius} | {told['joined']:,} | {times} | {growth} | {told['wrong']} of {SAMPLE} |")
    if given.peer:
        print(f"\nAll pairs within the radius among {PEER_ROWS:,} hashes:\n")
        print("| radius | pairmill s | imagededup s | ratio (its faster way) | the same pairs |\n" + "| --- " * 5 + "|")
        for radius in given.radius:
            ours_s, theirs, same = peer(given.peer, radius)
            told = ", ".join(f"{method} {seconds:.1f}" for method, seconds in theirs.items())
            ratio = min(theirs.values()) / ours_s
            print(f"| {radius} | {ours_s:.2f} | {told} | {ratio:.0f} | {'yes' if same else 'NO'} |")


if __name__ == "__main__":
    main()
