"""Semantic duplicates at scale: `python benchmarks/semantic_duplicates.py [--rows 200000] [--width 512]
[--epsilon 0.01 0.03 0.05 0.1] [--engine inline] [--workers 2]`. Prints a Markdown table.

Made embeddings lie around 2,000 themes, as an image model's do; a tenth are near copies of others at cosine distances
of 0 to 0.1, and 2 % are one picture ("image not found") with a little noise. They lie in shards of 10,000 in a
workspace of their own, and the reducer runs on it whole: training, assignment, spilling, solving. Every epsilon has a
process of its own. Memory is the process's greatest (its workers' beside it are not counted, so measure
inline); "wrong" counts rows of 60 clusters, the largest among them, whose leader isn't that of brute force in float64.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from near_duplicates import peak_mb

THEMES, PLANTED, ONE, SHARD_ROWS, CHECKED = 2000, 0.1, 0.02, 10_000, 60


def embeddings(rows: int, width: int) -> np.ndarray:
    """(N, D) fp16 of length 1."""
    chance = np.random.default_rng(0)
    themes = chance.standard_normal((THEMES, width), dtype=np.float32)
    made = themes[chance.integers(0, THEMES, rows)] + 0.8 * chance.standard_normal((rows, width), dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    copies = chance.choice(rows, int(PLANTED * rows), replace=False)
    away = np.sqrt(2 * chance.uniform(0, 0.1, len(copies)) / width)[:, None]
    made[copies] = made[chance.integers(0, rows, len(copies))] + away * chance.standard_normal((len(copies), width))
    same = chance.choice(rows, int(ONE * rows), replace=False)
    made[same] = made[0] + 0.02 / np.sqrt(width) * chance.standard_normal((len(same), width))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float16)


def fill(root: str, rows: int, width: int) -> None:
    """A workspace with tables only: the reducer reads no image."""
    import pyarrow as pa

    from pairs.schemas import PAIRS
    from pairs.shard import ShardRef
    from pairs.workspace import Workspace

    store, made = Workspace.open(root, create=True).store, embeddings(rows, width)
    for index, start in enumerate(range(0, rows, SHARD_ROWS)):
        some = made[start : start + SHARD_ROWS]
        uids = pa.array([f"{row:032x}" for row in np.random.default_rng(index).permutation(len(some)) + start])
        known = {"uid": uids, "url_key": uids, "status": pa.repeat("ok", len(some))}
        pairs = pa.table({f.name: known.get(f.name, pa.nulls(len(some), f.type)) for f in PAIRS}, schema=PAIRS)
        ref = ShardRef("pairs/made-0123456789ab/0000", index)
        store.write_table(ref.table, pairs)
        offsets = np.arange(len(some) + 1, dtype=np.int32) * width
        vectors = pa.ListArray.from_arrays(pa.array(offsets), pa.array(some.ravel()))
        store.write_table(ref.beside("scores/clip-aaaaaaaaaaaa"), pa.table({"uid": uids, "image": vectors}))


def measure(root: str, epsilon: float, engine: str, workers: int) -> dict[str, Any]:
    """One reduction of the whole workspace, and its check."""
    from filters import parts
    from filters.reduce import run_reducers
    from filters.semantic_duplicates import SemanticDuplicates
    from pairs.shard import list_shards
    from pairs.workspace import Workspace

    parts.SPREAD_BYTES = 0  # the made pair tables are nearly empty
    store, scores = Workspace.open(root).store, {"clip": "scores/clip-aaaaaaaaaaaa"}
    refs = list_shards(store, "pairs")
    reducers = {"semantic_duplicates": SemanticDuplicates(epsilon=epsilon)}
    before = peak_mb()
    began, worked = time.perf_counter(), time.process_time()
    folder = run_reducers(store, reducers, {"made": refs}, scores, [], engine, workers)["semantic_duplicates"]  # type: ignore[arg-type]
    told = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - worked, "before_mb": before}
    told |= {"mb": peak_mb()}
    return told | check(store, refs, folder, epsilon)


def check(store: Any, refs: list[Any], folder: str, epsilon: float) -> dict[str, Any]:
    """What joined a leader, and how many rows of some clusters brute force answers otherwise."""
    from filters.kmeans import assigned, vectors

    path = next(name for name in store.files(folder, ".npy"))
    with store.fs.open(store.full(path), "rb") as file:
        centroids = np.load(file)
    uids, groups, made = [], [], []
    for ref in refs:
        table = store.read_table(ref.beside(folder))
        uids += table["uid"].to_pylist()
        groups += table["group"].to_pylist()
        made.append(vectors(store.read_table(ref.beside("scores/clip-aaaaaaaaaaaa"))["image"], "clip.image")[0])
    whole, cluster = np.concatenate(made), np.concatenate([assigned(part, centroids) for part in made])
    uid, group = np.array(uids), np.array(groups)
    sizes = np.bincount(cluster, minlength=len(centroids))
    chosen = np.unique([*np.argsort(-sizes)[:5], *np.random.default_rng(0).integers(0, len(sizes), CHECKED - 5)])
    wrong = sum(_wrong(np.flatnonzero(cluster == one), whole, uid, group, epsilon) for one in chosen)
    told = {"clusters": len(sizes), "largest": int(sizes.max()), "removed": float((uid != group).mean())}
    return told | {"wrong": int(wrong), "checked": int(sizes[chosen].sum())}


def _wrong(rows: np.ndarray, whole: np.ndarray, uid: np.ndarray, group: np.ndarray, epsilon: float) -> int:
    rows = rows[np.argsort(uid[rows])]
    unit = whole[rows].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    led: list[int] = []
    count = 0
    for place in range(len(rows)):
        near = np.flatnonzero(unit[led] @ unit[place] > 1 - epsilon) if led else []
        leader = led[near[0]] if len(near) else place
        led += [place] * (leader == place)
        count += uid[rows[leader]] != group[rows[place]]
    return count


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[0.01, 0.03, 0.05, 0.1])
    parser.add_argument("--engine", choices=["inline", "ray"], default="inline")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.epsilon[0], given.engine, given.workers)))
        return
    with tempfile.TemporaryDirectory() as root:
        fill(f"{root}/work", given.rows, given.width)
        print(f"{given.rows:,} × {given.width}, {given.engine}\n")
        print("| ε | removed | s | CPU s | MB (before) | clusters (largest) | wrong |\n" + "| --- " * 7 + "|")
        for epsilon in given.epsilon:
            how = ["--epsilon", str(epsilon), "--engine", given.engine, "--workers", str(given.workers)]
            command = [sys.executable, __file__, "--one", f"{root}/work", *how]
            told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"| {epsilon} | {told['removed']:.1%} | {told['seconds']:.1f} | {told['cpu_s']:.1f} | {told['mb']} "
                  f"({told['before_mb']}) | {told['clusters']} ({told['largest']:,}) "
                  f"| {told['wrong']} of {told['checked']:,} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
