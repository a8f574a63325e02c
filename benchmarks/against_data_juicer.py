"""Curation against data-juicer with the same operators, thresholds and real pairs, both warm, two processes each.

    python benchmarks/real_pairs.py packages PAIRS
    uv venv PEER && uv pip install --python PEER/bin/python -r benchmarks/peers/data_juicer.txt
    python benchmarks/against_data_juicer.py PAIRS FOLDER --peer PEER/bin/python [--repeats 5]

Ours: score, reduce and select over shards; theirs: its executor from JSONL to JSONL over the images as files, plain and
with each of its fusion strategies, of which the fastest counts. Both decode pictures of the same sides and format
(ours were stored by `pairmill fetch`, which isn't timed). Neither side's first run counts. Decisions are compared by
image.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from memory import Peak

SIDES, ASPECT, CHARS, ALNUM, REPETITION = 64, 3.0, 6, 0.6, 0.5
KEEP = [
    {"column": "image_stats.shorter_side_px", "min": SIDES},
    {"column": "image_stats.aspect", "max": ASPECT},
    {"column": "text_stats.chars", "min": CHARS},
    {"column": "text_stats.alnum_ratio", "min": ALNUM},
    {"column": "text_stats.char_repetition", "max": REPETITION},
    {"column": "text_stats.word_repetition", "max": REPETITION},
    {"one_per": "near_duplicates.group"},
]
PROCESS = [
    {"image_shape_filter": {"min_width": SIDES, "min_height": SIDES}},
    {"image_aspect_ratio_filter": {"min_ratio": 1 / ASPECT, "max_ratio": ASPECT}},
    {"text_length_filter": {"min_len": CHARS, "max_len": 100_000}},
    {"alphanumeric_filter": {"tokenization": False, "min_ratio": ALNUM}},
    {"character_repetition_filter": {"rep_len": 10, "max_ratio": REPETITION}},
    {"word_repetition_filter": {"rep_len": 10, "max_ratio": REPETITION, "tokenization": False}},
    {"image_deduplicator": {"method": "phash"}},
]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy fusion": {"op_fusion": True, "fusion_strategy": "greedy"},
    "probe fusion": {"op_fusion": True, "fusion_strategy": "probe"},
}


def ours(pairs: Path, folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of each warm curation, and the kept images by name."""
    from cluster.session import ray_session
    from filters.engine import plan, score_shards
    from filters.lookup import load_filter, load_reducer
    from filters.reduce import run_reducers
    from filters.selection import select
    from pairs.recipe import Recipe
    from pipelines import stages
    from pipelines.run import open_run

    recipe = {
        "name": "peer", "sources": {"real": {"kind": "folder", "path": str(pairs)}}, "workers": 2, "keep": KEEP,
        "fetch": {"side_px": 512, "quality": 95, "shard_pairs": 1000},
        "filters": {"image_stats": {"looks": False}, "text_stats": {}, "image_hash": {"only": ["phash"]}},
        "reducers": {"near_duplicates": {"hash": "image_hash.phash", "max_distance": 0, "confirm": None}},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = str(Path(sys.executable).parent / "pairmill")
    subprocess.run([command, "fetch", str(folder / "recipe.yaml"), "--workspace", str(folder / "space")], check=True)
    seconds, kept = [], []
    told, peak = Recipe.model_validate(recipe), Peak()
    run = open_run(folder / "recipe.yaml", workspace=str(folder / "space"))
    peak.start()
    with ray_session(2):
        store, shards = run.workspace.store, stages.shards(run)
        planned = plan({name: load_filter(name, settings) for name, settings in told.filters.items()})
        for _ in range(repeats + 1):
            for made in ("scores", "selections"):
                shutil.rmtree(folder / "space" / made, ignore_errors=True)
            began = time.perf_counter()
            refs = [ref for of in shards.values() for ref in of]
            score_shards(store, planned, refs, engine="ray", workers=2)
            scores = {one.name: one.folder for one in planned}
            reducers = {name: load_reducer(name, settings) for name, settings in told.reducers.items()}
            scores |= run_reducers(store, reducers, shards, scores, [])
            chosen = select(store, "peer", told.keep, told.texts, shards, scores, [])
            seconds.append(time.perf_counter() - began)
        for ref in refs:
            names = store.read_table(ref.table, ["url"])["url"].to_pylist()
            verdicts = store.read_table(ref.beside(chosen.folder), ["kept"])["kept"].to_pylist()
            kept += [name.rpartition(":")[2] for name, there in zip(names, verdicts, strict=True) if there]
    return {"seconds": seconds[1:], "kept": sorted(kept), "peak_bytes": peak.bytes}


def theirs(pairs: Path, folder: Path, repeats: int, peer: Path, variant: str) -> dict[str, Any]:
    """The same of data-juicer with one of `VARIANTS`."""
    home = folder / variant.replace(" ", "-")
    home.mkdir(parents=True, exist_ok=True)
    rows = [
        {"text": image.with_suffix(".txt").read_text().strip(), "images": [str(image)]}
        for image in sorted(pairs.glob("*.jpg"))
    ]
    (home / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    recipe = {
        "project_name": "peer", "dataset_path": str(home / "pairs.jsonl"), "np": 2, "use_cache": False,
        "text_keys": "text", "image_key": "images", "process": PROCESS, **VARIANTS[variant],
    }  # fmt: skip
    (home / "recipe.yaml").write_text(json.dumps(recipe))
    script = Path(__file__).with_name("data_juicer_peer.py")
    command = [str(peer), str(script), str(home / "recipe.yaml"), str(repeats + 1)]
    with (home / "log.txt").open("w") as log:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=log, text=True)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told | {"seconds": told["seconds"][1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="the Python of data-juicer's environment")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    pairs, folder = arguments.pairs.resolve(), arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = {"pairmill": ours(pairs, folder, arguments.repeats)}
    found |= {v: theirs(pairs, folder, arguments.repeats, arguments.peer.absolute(), v) for v in VARIANTS}
    count = len(list(pairs.glob("*.jpg")))
    print(f"{count} pairs\n\n| | pairs/s, median (lowest to highest) | peak memory | kept |\n| --- | --- | --- | --- |")
    for name, one in found.items():
        rates = sorted(count / s for s in one["seconds"])
        told = f"{statistics.median(rates):.0f} ({rates[0]:.0f} to {rates[-1]:.0f})"
        print(f"| {name} | {told} | {one['peak_bytes'] / 1e9:.2f} GB | {len(one['kept'])} |")
    best = min(VARIANTS, key=lambda v: statistics.median(found[v]["seconds"]))
    ratios = sorted(t / o for t in found[best]["seconds"] for o in found["pairmill"]["seconds"])
    print(f"\nratio to {best}: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    mine, other = set(found["pairmill"]["kept"]), set(found[best]["kept"])
    print(f"agreement: {1 - len(mine ^ other) / count:.4f}; kept by ours alone {len(mine - other)}, "
          f"by theirs alone {len(other - mine)}")  # fmt: skip


if __name__ == "__main__":
    main()
