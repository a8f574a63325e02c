"""Training speed against open_clip_train: the same weights to begin with, tars, images, batch, precision and threads.

    python benchmarks/real_pairs.py packages PAIRS
    python benchmarks/against_open_clip_train.py PAIRS FOLDER [--models base small] [--repeats 3] [--steps 12]

First both train on centre crops of the model's own size, so that they see the same pixels. Theirs is
`python -m open_clip_train.main`, tried with 1 and 2 workers, with and without `--torchcompile`; the fastest of a trial
takes part. Ours is tried with and without `pretrain.compile`. Then they take turns; speed is that of all steps
after the first `WARM`, from their own logs. `bound` is what FLOPs let expect: theirs of a pair, in 77 text positions,
over ours. Second, at equal steps: images at their own aspect in at most N patches against squares of N, both ours, with
the retrieval of held-out pairs by each. Prints Markdown. About 40 minutes on two quiet cores.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from pairs.identity import local_key, make_uid, sha256_hex
from pairs.pretrain import ModelSpec, PretrainSpec, TowerSpec
from pairs.process import ROOT
from pairs.schemas import TRAINING
from pairs.shard import ShardRef, write_shard
from pairs.store import Store, table_metadata
from training import export
from training.config import Pin, TrainConfig
from training.evaluate import retrieval
from training.hardware import precision
from training.tokens import encode

CONTEXT, WARM, SHARDS, HELD = 77, 3, 4, 500
MODELS = {  # and the batch
    "base": (  # ViT-B-32
        ModelSpec(embed_dim=512, image_px=224, patch_px=32, vision=TowerSpec(layers=12, width=768, heads=12),
                  text=TowerSpec(layers=12, width=512, heads=8), context=CONTEXT), 64),
    "small": (
        ModelSpec(embed_dim=256, image_px=128, patch_px=16, vision=TowerSpec(layers=6, width=384, heads=6),
                  text=TowerSpec(layers=6, width=256, heads=4), context=CONTEXT), 128),
}  # fmt: skip
MODELS["tiny"] = ModelSpec(context=CONTEXT), 32  # to try this script
ASPECT = ModelSpec(context=32)
THEIRS = {f"{n} worker{'s' * (n > 1)}{', --torchcompile' * c}": (n, c) for c in (False, True) for n in (1, 2)}
OURS = {"eager": False, "compile: true": True}
Pair = tuple[str, bytes, str]  # name, JPEG, caption


def pairs_of(folder: Path) -> list[Pair]:
    return [(p.stem, p.read_bytes(), p.with_suffix(".txt").read_text().strip()) for p in sorted(folder.glob("*.jpg"))]


def squared(data: bytes, side: int) -> bytes:
    """The middle square of a JPEG at side x side, as a JPEG."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    n = min(image.shape[:2])
    y, x = ((length - n) // 2 for length in image.shape[:2])
    small = cv2.resize(image[y : y + n, x : x + n], (side, side), interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def shards(root: Path, pairs: list[Pair]) -> list[Pin]:
    """Training shards of the pairs; both sides read their tars."""
    store, pins = Store(root), []
    for index in range(SHARDS):
        ref = ShardRef("shards/all-0123456789ab/0000", index)
        write_shard(store, ref, (_row(*pair) for pair in pairs[index::SHARDS]), TRAINING)
        pins.append(
            Pin(folder=ref.folder, index=index, tar_sha256=table_metadata(store.read_table(ref.table))["tar_sha256"])
        )
    return pins


def _row(name: str, data: bytes, text: str) -> tuple[dict[str, Any], bytes]:
    key, (height, width) = (
        local_key("real", name),
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[:2],
    )
    row = {"uid": make_uid(key, sha256_hex(data)), "url_key": key, "source": "real", "increment": "0000"}
    row |= {"trusted": False, "status": "ok", "text": text, "image_ext": "jpg", "width": width, "height": height}
    return row | {"texts": [{"text": text, "kind": "alt", "language": "en", "probability": None}]}, data


def spec_of(model: ModelSpec, batch: int, steps: int, **settings: Any) -> PretrainSpec:
    budget = (model.image_px // model.patch_px) ** 2
    return PretrainSpec(
        model=model, workers=1, batch_pairs=batch, steps=steps, max_patches=budget, checkpoint_every=10**6,
        warmup_steps=min(50, steps // 2), learning_rate=1e-3, **({"jitter": 0.0} | settings),
    )  # fmt: skip


def train(root: Path, pins: list[Pin], out: str, spec: PretrainSpec) -> tuple[list[float], Path]:
    """Seconds of each step after the first `WARM`, and the model's folder; in a process of its own."""
    config = TrainConfig(store=str(root), shards=pins, spec=spec, out_dir=str(root / out))
    job = root / f"{out}.json"
    job.write_text(config.model_dump_json())
    _call([sys.executable, "-m", "training.run", str(job)], root / f"{out}.log")
    lines = [json.loads(line) for line in (root / out / "metrics.jsonl").read_text().splitlines()]
    return [line["pairs"] / line["pairs_per_s"] for line in lines[WARM:]], root / out / "model"


def peer(
    root: Path, out: str, model: Path, batch: int, steps: int, workers: int, compiled: bool, dtype: str
) -> list[float]:
    """Seconds of each of open_clip_train's steps after the first `WARM`."""
    command = [
        *(sys.executable, "-m", "open_clip_train.main", "--device", "cpu", "--model", f"local-dir:{model}"),
        *("--train-data", f"{root}/shards/all-0123456789ab/0000/{{00000..{SHARDS - 1:05d}}}.tar"),
        *("--dataset-type", "webdataset", "--train-num-samples", str(batch * steps), "--batch-size", str(batch)),
        *("--epochs", "1", "--workers", str(workers), "--precision", dtype, "--log-every-n-steps", "1"),
        *("--save-frequency", "0", "--logs", str(root), "--name", out, "--lr", "1e-3", "--warmup", str(steps // 2)),
        *("--aug-cfg", "scale=(1.0, 1.0)"),  # no crops: the same pixels
        *(["--torchcompile"] if compiled else []),
    ]
    _call(command, root / f"{out}.log")
    times = [float(x) for x in re.findall(r"Batch \(t\): ([\d.]+)", (root / out / "out.log").read_text())]
    assert len(times) == steps, (len(times), steps)
    return times[WARM:]


def _call(command: list[str], log: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(os.cpu_count())}
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nfailed: see {log}\n" + log.read_text()[-2000:])


def flops(model: ModelSpec, texts: list[int]) -> float:
    """FLOPs of forward and backward of a pair at the model's own square, the mean over these lengths of texts."""
    cells, per = (model.image_px // model.patch_px) ** 2, len(texts)
    towers = (model.vision, [cells + 1] * per), (model.text, texts)
    blocks = sum(t.layers * (24 * t.width**2 * n + 4 * t.width * n * n) for t, ns in towers for n in ns) / per
    projections = 2 * model.embed_dim * (model.vision.width + model.text.width)
    patches = 2 * cells * 3 * model.patch_px**2 * model.vision.width  # whose input needs no gradient
    return 3 * (blocks + projections) + 2 * patches


def compare(name: str, pairs: list[Pair], folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """A table's rows: both sides' speeds in turns, their ratio and its bound."""
    model, batch = MODELS[name]
    root = folder / name
    square = [(key, squared(data, model.image_px), text) for key, data, text in pairs]
    pins = shards(root, square)
    dtype = precision(spec_of(model, batch, 1), torch.device("cpu"))
    theirs_dtype = "amp_bf16" if dtype == torch.bfloat16 else "fp32"
    start = root / "start"
    export.save(start, model, export.build(model, 0).state_dict(), {})
    count = 0

    def their(way: str) -> float:
        nonlocal count
        count += 1
        times = peer(root, f"theirs-{count}", start, batch, args.steps, *THEIRS[way], theirs_dtype)
        return batch * len(times) / sum(times)

    def our(way: str) -> float:
        nonlocal count
        count += 1
        spec = spec_of(model, batch, args.steps, compile=OURS[way])
        times, made = train(root, pins, f"ours-{count}", spec)
        shutil.rmtree(made.parent)
        return batch * len(times) / sum(times)

    trial = {way: their(way) for way in THEIRS}, {way: our(way) for way in OURS}
    best, own = (max(tried, key=tried.__getitem__) for tried in trial)
    turns = [(their(best), our(own)) for _ in range(args.repeats)]
    lengths = [len(encode(text, CONTEXT)[0]) for _, _, text in pairs]
    bound = flops(model, [CONTEXT] * len(lengths)) / flops(model, lengths)
    ratios = [b / a for a, b in turns]
    medians = [statistics.median(side) for side in zip(*turns, strict=True)]
    middle = statistics.median(ratios)
    yield (
        f"| {name}, batch {batch}, {theirs_dtype} | {medians[0]:.1f} ({best}) | {medians[1]:.1f} ({own}) | "
        f"{middle:.2f} ({min(ratios):.2f}–{max(ratios):.2f}) | {bound:.2f} | {middle / bound:.2f} |"
    )
    for tried in trial:
        yield f"| *trials, pairs/s* | {'; '.join(f'{way}: {speed:.1f}' for way, speed in tried.items())} | | | | |"


def aspect(pairs: list[Pair], folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """A table's rows: images at their own aspect and squares of the same budget, and who finds held-out captions."""
    chance = random.Random(3)
    order = chance.sample(pairs, len(pairs))
    seen = {text for _, _, text in order[HELD:]}
    held = [pair for pair in order[:HELD] if pair[2] not in seen]
    kinds: dict[str, Callable[[bytes], bytes]] = {
        "own aspect": lambda data: data,
        "squares": lambda data: squared(data, 2 * ASPECT.image_px),
    }
    for kind, shaped in kinds.items():
        root = folder / kind.replace(" ", "-")
        pins = shards(root, [(key, shaped(data), text) for key, data, text in order[HELD:]])
        times, made = train(root, pins, "run", spec_of(ASPECT, 64, args.aspect_steps, jitter=0.15))
        lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
        tokens = statistics.fmean(line["tokens_per_s"] / line["pairs_per_s"] for line in lines)
        found = retrieval(made, [shaped(data) for _, data, _ in held], [text for _, _, text in held])
        recalls = [found.recalls[f"image_to_text_at_{k}"] for k in (1, 5)]
        told = " | ".join(f"{r.value:.3f} ({r.low:.3f}–{r.high:.3f})" for r in recalls)
        median = 1e3 * statistics.median(times)
        yield f"| {kind} | {tokens:.1f} | {median:.0f} | {sum(times):.0f} | {told} | {len(held)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("folder", type=Path, help="is emptied first")
    parser.add_argument("--models", nargs="*", default=["base", "small"], choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of each run; even, as two workers share them")
    parser.add_argument("--aspect-steps", type=int, default=600, help="0: leave the second comparison out")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    pairs = pairs_of(args.pairs)
    if args.models:
        print("| model | open_clip_train, pairs/s | pairmill, pairs/s | ratio (least–most) | bound | ratio / bound |")
        print("| --- | --- | --- | --- | --- | --- |")
    for name in args.models:
        for row in compare(name, pairs, args.folder, args):
            print(row, flush=True)
    if args.aspect_steps:
        print("\n| images | tokens of a pair | ms a step | s in all | R@1, image to text | R@5 | held out |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for row in aspect(pairs, args.folder, args):
            print(row, flush=True)


if __name__ == "__main__":
    main()
