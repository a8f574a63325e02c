"""Fill of packed batches on real lengths: useful over computed tokens, tails included, and how many shapes occur.

    python benchmarks/fill.py FOLDER [--batch 256 512] [--ranks 1 2 4] [--patches 64 196] [--epochs 2]

FOLDER holds pairs as `real_pairs.py` makes them. An image counts its patches within the budget and a class token, a
text its CLIP tokens. Ours: one shape for each of the two streams of a rank, made by the trainer's own plan. Rows: next
fit over the endless stream (as lmms-engine packs), best fit of descending lengths over the same windows,
in the length that fills best of 512, 1,024 and 2,048 for each stream. `optimum` is the least that one shape can be:
all tokens spread evenly over all steps and ranks. Prints a Markdown table; no clock is read.
"""

import argparse
import bisect
import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from real_pairs import as_shards

from pairs.pretrain import ModelSpec, PretrainSpec, TowerSpec
from pairs.store import Store
from training.data import Loader
from training.packing import tail
from training.plan import Cost, Plan
from training.tables import make_plan

ROWS, MULTIPLE = (512, 1024, 2048), 8
COST = Cost((12, 768), (12, 512))
MODEL = ModelSpec(patch_px=16, image_px=224, context=77, vision=TowerSpec(layers=1, width=64, heads=1))
Streams = list[tuple[list[int], list[int]]]  # lengths of images and of texts, window by window


def ours(plan: Plan, store: Store, ranks: int, steps: int) -> tuple[float, int, float]:
    """Fill, shapes, and the fill of the optimum."""
    loader = Loader(plan, store, 0, ranks, COST, 16, 0.0, multiple=MULTIPLE, steps=steps)
    shapes, useful = Counter[tuple[int, int, int]](), np.zeros(2)
    for step in range(steps):
        for share in plan.split(step, ranks, COST):
            tokens = plan.tokens_of(share).sum(0) + np.array([len(share), 0])
            full = [int(n) + tail(int(n), MULTIPLE, least)[0] for n, least in zip(tokens, loader.least, strict=True)]
            shapes[len(share), full[0], full[1]] += 1
            useful += tokens
    computed = sum((images + texts) * times for (_, images, texts), times in shapes.items())
    even = (-(-useful // (steps * ranks))).sum() * steps * ranks
    return float(useful.sum() / computed), len(shapes), float(useful.sum() / even)


def next_fit(lengths: Iterable[int], row: int) -> int:
    """Rows when a document that doesn't fit closes the open row for good."""
    rows, left = 0, 0
    for length in lengths:
        if length > left:
            rows, left = rows + 1, row
        left -= length
    return rows


def best_fit(lengths: Iterable[int], row: int) -> int:
    """Rows when each document, longest first, goes where it leaves least."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(left, length)
        bisect.insort(left, (left.pop(place) if place < len(left) else row) - length)
    return len(left)


def in_rows(windows: Streams, rows: Callable[[Sequence[int], int], int], joined: bool) -> float:
    """Fill of both streams together, each in the row length that suits it best."""
    useful = computed = 0
    for stream in zip(*windows, strict=True):
        parts = [list(itertools.chain(*stream))] if joined else list(stream)
        useful += sum(map(sum, parts))
        computed += min(sum(rows(part, row) for part in parts) * row for row in ROWS if row >= max(map(max, parts)))
    return useful / computed


def windows_of(plan: Plan, steps: int, single: bool) -> Streams:
    """Lengths by window of the plan, or by single step."""
    found, step = [], 0
    while step < steps:
        end = step + 1 if single else plan.window_of(step)[1]
        patches, texts = plan.tokens_of([pair for s in range(step, min(end, steps)) for pair in plan.rows(s)]).T
        found.append(((patches + 1).tolist(), texts.tolist()))
        step = end
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, values in {"--batch": [256, 512], "--ranks": [1, 2, 4], "--patches": [64, 196]}.items():
        parser.add_argument(name, type=int, nargs="+", default=values)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    print("| patches | batch | ranks | ours | shapes | optimum | next fit | best fit, a window | best fit, a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        pins = as_shards(arguments.folder, store)
        for patches, batch in itertools.product(arguments.patches, arguments.batch):
            spec = PretrainSpec(model=MODEL, max_patches=patches, batch_pairs=batch, workers=1)
            plan, _ = make_plan(store, pins, spec)
            steps = arguments.epochs * len(plan) // batch
            wide, narrow = (windows_of(plan, steps, each) for each in (False, True))
            rows = in_rows(wide, next_fit, True), in_rows(wide, best_fit, False), in_rows(narrow, best_fit, False)
            for ranks in arguments.ranks:
                fill, shapes, optimum = ours(plan, store, ranks, steps)
                told = " | ".join(f"{share:.4f}" for share in (optimum, *rows))
                print(f"| {patches} | {batch} | {ranks} | **{fill:.4f}** | {shapes} | {told} |", flush=True)


if __name__ == "__main__":
    main()
