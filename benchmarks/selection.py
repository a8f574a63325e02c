"""How long a changed threshold takes on a corpus of score tables: the selection anew, from the recipe to its funnel.

    python benchmarks/selection.py FOLDER [--rows 1000000] [--shards 100] [--repeats 3]

Writes pair tables (without tars: a selection reads none) and tables of three filters and two reducers with random
values of realistic shapes, selects once, then moves a threshold and selects again, each in a process of its own with
its wall time, CPU time and peak memory. Prints a markdown table; the corpus is kept and used again.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from filters.selection import select
from pairs.rules import Rule, TextsSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef
from pairs.store import Store
from pairs.workspace import Workspace

SCORES = {name: f"scores/{name}-{'0' * 12}" for name in
          ("image_stats", "text_stats", "clip", "exact_duplicates", "near_duplicates")}  # fmt: skip
SENTENCE = "a red boat on the quiet lake near an old stone bridge with two men and their dog in rain"
WORDS = np.array(SENTENCE.split())


def digests(chance: np.random.Generator, count: int, digits: int) -> pa.Array:
    return pa.array([chance.bytes(digits // 2).hex() for _ in range(count)])


def write_corpus(store: Store, rows: int, shards: int) -> None:
    """Tables of `shards` shards; 3 % of the pairs have a near duplicate and 1 % an exact one, in any shard."""
    chance = np.random.default_rng(0)
    sizes = np.full(shards, rows // shards)
    leaders: list[str] = []
    for index, size in enumerate(sizes):
        ref, uids = ShardRef("pairs/web-0123456789ab/0000", index), digests(chance, int(size), 32)
        texts = [" ".join(chance.choice(WORDS, chance.integers(3, 16))) for _ in range(size)]
        listed = [[{"text": text, "kind": "alt", "language": "en"}] for text in texts]
        columns = {name: pa.nulls(int(size), PAIRS.field(name).type) for name in PAIRS.names}
        columns |= {"uid": uids, "key": uids, "url_key": digests(chance, int(size), 32), "text": pa.array(texts)}
        columns |= {"texts": pa.array(listed, PAIRS.field("texts").type), "sha256": digests(chance, int(size), 64)}
        columns |= {"status": pa.array(["ok"] * int(size)), "source_uid": digests(chance, int(size), 32)}
        columns["url"] = pa.array([f"http://host{i % 977}.test/images/{u}.jpg" for i, u in enumerate(uids.to_pylist())])
        store.write_table(ref.table, pa.table(columns).cast(PAIRS))
        for name, values in scores(chance, int(size), uids.to_pylist(), leaders).items():
            store.write_table(ref.beside(SCORES[name]), pa.table({"uid": uids, **values}))
        leaders = uids.to_pylist()[:2000]


def scores(
    chance: np.random.Generator, size: int, uids: list[str], leaders: list[str]
) -> dict[str, dict[str, pa.Array]]:
    def group(share: float) -> pa.Array:
        joins = chance.random(size) < (share if leaders else 0)
        return pa.array([leaders[chance.integers(len(leaders))] if j else u for j, u in zip(joins, uids, strict=True)])

    side, cosine = chance.lognormal(6, 0.6, size).astype(np.int32), chance.normal(0.25, 0.06, size).astype(np.float32)
    return {
        "image_stats": {"shorter_side_px": pa.array(side), "aspect": pa.array(1 + chance.exponential(0.5, size))},
        "text_stats": {
            "chars": pa.array((side % 90).astype(np.int32)),
            "words": pa.array((side % 17).astype(np.int32)),
        },
        "clip": {"cosine": pa.array(cosine, mask=chance.random(size) < 0.002)},
        "exact_duplicates": {"group": group(0.01)},
        "near_duplicates": {"group": group(0.03), "distance": pa.array(chance.integers(0, 10, size).astype(np.int32))},
    }


def rules(cosine: float) -> list[Rule]:
    return [
        Rule(column="image_stats.shorter_side_px", min=200),
        Rule(column="image_stats.aspect", max=3),
        Rule(column="text_stats.words", min=3),
        Rule(column="text_stats.chars", quantile=(0.01, 0.99)),
        Rule(column="clip.cosine", min=cosine),
        Rule(one_per="exact_duplicates.group"),
        Rule(one_per="near_duplicates.group", best="clip.cosine"),
    ]


def measure(folder: Path, cosine: float) -> None:
    """One selection, told as JSON."""
    store = Workspace.open(folder).store
    started, cpu = time.perf_counter(), time.process_time()
    shards = {"web": [ShardRef("pairs/web-0123456789ab/0000", i) for i in range(len(store.files("pairs", ".parquet")))]}
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = select(store, "bench", rules(cosine), TextsSpec(), shards, SCORES, [])
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    told = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu, "memory_mib": memory / 1024}
    tables = hashlib.sha256(b"".join(store.read(path) for path in store.files(done.folder, ".parquet"))).hexdigest()
    rows = done.funnel["total"]["pairs"]
    print(json.dumps(told | {"before_mib": base / 1024, "kept": done.kept, "rows": rows, "tables": tables[:12]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cosine", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cosine is not None:
        return measure(arguments.folder, arguments.cosine)
    store = Workspace.open(arguments.folder, create=True).store
    if not store.files("pairs", ".parquet"):
        write_corpus(store, arguments.rows, arguments.shards)
    print("| threshold | rows | kept | seconds | CPU seconds | peak memory, MiB | tables |\n| --- | " + "--- | " * 6)
    for n in range(arguments.repeats + 1):
        store.delete("selections", recursive=True) if n == 0 else None
        command = [sys.executable, __file__, str(arguments.folder), "--cosine", str(0.2 + 0.01 * n)]
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| clip.cosine min {0.2 + 0.01 * n:.2f} | {told['rows']:,} | {told['kept']:,} | {told['seconds']:.1f} | "
            f"{told['cpu']:.1f} | {told['memory_mib']:,.0f} (before: {told['before_mib']:,.0f}) | `{told['tables']}` |"
        )


if __name__ == "__main__":
    main()
