"""SIGKILL of a training at random wall times, resumed on 1, 2 or 4 ranks in turn, whole (DDP) or cut (FSDP2).

    python benchmarks/train_kills.py FOLDER [--kills 10] [--steps 240] [--seed 1]

What a step consumed is read from its batch: each image is of one colour that is the number of its pair, so a rank tells
the uids of the very pixels that it computes on. One run isn't killed; one is, resumed on other numbers of ranks: each
step's uids, and their order by the plan's digest, are the same, however often a step was done. A third is killed on two
ranks alone: losses and gradient norms are bit for bit those of the first, and so is its model.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pairs.fingerprint import content_hash
from pairs.identity import local_key, make_uid, sha256_hex
from pairs.pretrain import ModelSpec, PretrainSpec, TowerSpec
from pairs.schemas import TRAINING
from pairs.shard import ShardRef, write_shard
from pairs.store import Store, table_metadata
from training import launch
from training.config import Pin, TrainConfig

PAIRS, EACH, BATCH, BASE, APART = 1000, 100, 32, 64, 4  # a colour has three digits of base 64, four levels apart
TOWER = TowerSpec(layers=3, width=96, heads=3)
MODEL = ModelSpec(embed_dim=96, image_px=48, patch_px=8, vision=TOWER, text=TOWER, context=16)
RANKS = (1, 2, 4)
SAME = ("step", "loss", "grad_norm", "lr", "uids_sha256")


def pair(number: int) -> tuple[dict[str, Any], bytes]:
    digits = [number // BASE**place % BASE for place in (2, 1, 0)]
    height, width = ((48, 80), (64, 64), (90, 40))[number % 3]
    picture = np.full((height, width, 3), [APART * digit + APART // 2 for digit in digits], np.uint8)
    data, key = cv2.imencode(".png", picture[:, :, ::-1])[1].tobytes(), local_key("drawn", f"{number}.png")
    text = f"colour number {number}" + " of a long list" * (number % 4)
    row = {"uid": make_uid(key, sha256_hex(data)), "url_key": key, "source": "drawn", "increment": "0000"}
    row |= {"trusted": False, "status": "ok", "text": text, "image_ext": "png", "width": width, "height": height}
    return row | {"texts": [{"text": text, "kind": "alt", "language": "en", "probability": None}]}, data


def draw(store: Store) -> list[Pin]:
    pins = []
    for index in range(PAIRS // EACH):
        ref = ShardRef("shards/all-0123456789ab/0000", index)
        write_shard(store, ref, map(pair, range(index * EACH, (index + 1) * EACH)), TRAINING)
        sha256 = table_metadata(store.read_table(ref.table))["tar_sha256"]
        pins.append(Pin(folder=ref.folder, index=index, tar_sha256=sha256))
    return pins


def numbers(batch: Any) -> list[int]:
    """The pairs of a batch, by the colour of each image's first patch."""
    found = []
    for images, _ in batch.parts:
        for row in (images.pool + 1).tolist():
            digits = (images.patches[row].view(3, -1)[:, 0].long() // APART).tolist()
            found.append(int(sum(digit * BASE**place for digit, place in zip(digits, (2, 1, 0), strict=True))))
    return found


def be_rank(config: str) -> int:
    """One rank, which tells what it consumes."""
    from training import run
    from training.data import Loader

    path, plain = Path(os.environ["CONSUMED"] + os.environ["RANK"]), Loader.batches

    def telling(self: Loader, start: int, end: int, *given: Any, **named: Any) -> Iterator[Any]:
        with path.open("a", buffering=1) as file:
            for step, batch in enumerate(plain(self, start, end, *given, **named), start):
                file.write(json.dumps([step, numbers(batch)]) + "\n")
                yield batch

    Loader.batches = telling  # type: ignore[method-assign]
    return run.main(config)


def attempt(config: str) -> None:
    """One launch, whose ranks tell."""
    plain = launch.child
    launch.child = lambda command, **given: plain([sys.executable, __file__, "--rank", command[-1]], **given)  # type: ignore[assignment]
    launch.train(TrainConfig.model_validate_json(Path(config).read_text()))


def start(folder: Path, config: TrainConfig, number: int, ranks: int, parallel: str) -> "subprocess.Popen[bytes]":
    told = config.model_copy(update={"spec": config.spec.model_copy(update={"workers": ranks, "parallel": parallel})})
    out = Path(config.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    path = folder / f"{out.name}.json"
    path.write_text(told.model_dump_json())
    environment = os.environ | {"CONSUMED": str(out / f"consumed-{number:02d}-{ranks}-")}
    command = [sys.executable, __file__, "--attempt", str(path)]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def train(folder: Path, config: TrainConfig, ways: list[tuple[int, str]], kills: list[float]) -> None:
    """Trains to the end after kills, each try on the next of `ways`. A kill comes so many seconds after a first step;
    every fourth after its start, which is before that."""
    out = Path(config.out_dir)
    for number, kill_s in enumerate([*kills, None]):
        ranks, parallel = ways[number % len(ways)]
        began = time.monotonic()
        child = start(folder, config, number, ranks, parallel)
        while number % 4 != 3 and child.poll() is None and not [*out.glob(f"consumed-{number:02d}-*")]:
            time.sleep(0.05)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(kill_s)
        ended, after_s = child.poll(), time.monotonic() - began
        if ended is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        assert not ended, f"a try ended by itself with exit code {ended}: see {out / 'logs'}"
        done = [path.name for path in sorted((out / "checkpoints").glob("step-*"))]
        what = "done" if ended == 0 else f"killed; checkpoints: {', '.join(done) or 'none'}"
        what += ", amid a save" * bool([*(out / "checkpoints").glob(".tmp-*")])
        print(f"{out.name} {number}: {ranks} ranks, {parallel}, {after_s:.1f} s: {what}", flush=True)
        if ended == 0:
            break


def consumed(out: Path) -> dict[int, list[int]]:
    """The pairs of each step. A try in which all ranks told a step has to agree with every other such try."""
    tries: dict[tuple[str, int], list[list[int]]] = defaultdict(list)
    for path in out.glob("consumed-*"):
        for line in path.read_text().splitlines():
            if line.endswith("]]"):  # else cut short by the kill
                step, found = json.loads(line)
                tries[path.name.rpartition("-")[0], step].append(found)
    steps: dict[int, list[int]] = {}
    for (name, step), parts in sorted(tries.items()):
        if len(parts) == int(name.rpartition("-")[2]):
            whole = sorted(number for part in parts for number in part)
            assert steps.setdefault(step, whole) == whole, f"{name} took other pairs in step {step}"
    return steps


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def compare(folder: Path, store: Store, pins: list[Pin], steps: int) -> dict[str, Any]:
    runs = {name: folder / name for name in ("whole", "turns", "two")}
    took, lines = ({name: read(out) for name, out in runs.items()} for read in (consumed, metrics))
    uids = {number: pair(number)[0]["uid"] for number in range(PAIRS)}
    rows = [row["uid"] for pin in pins for row in store.read_table(pin.ref.table).to_pylist()]
    apart = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(lines["turns"], lines["whole"], strict=True))
    return {
        "steps": len(lines["whole"]),
        "steps told whole": {name: len(found) for name, found in took.items()},
        "steps done again": {name: sum(1 for _ in again(out)) - steps for name, out in runs.items()},
        "same uids consumed": took["whole"] == took["turns"] == took["two"] and len(took["whole"]) == steps,
        "same order by the plan": all(
            [line["uids_sha256"] for line in found] == [line["uids_sha256"] for line in lines["whole"]]
            for found in lines.values()
        ),
        "pairs in the shards": set(uids.values()) == set(rows),
        "each epoch whole by the step that ends it": all(whole_epochs(took["whole"], steps)),
        "two ranks: losses and norms bit for bit": [[a[k] for k in SAME] for a in lines["two"]]
        == [[b[k] for k in SAME] for b in lines["whole"]],
        "two ranks: same model": content_hash(runs["two"] / "model") == content_hash(runs["whole"] / "model"),
        "in turns: largest relative difference of a loss": apart,
        "save_fraction": sum(a["save_fraction"] for a in lines["whole"]) / steps,
    }


def whole_epochs(took: dict[int, list[int]], steps: int) -> list[bool]:
    """For each epoch that ends: by then each pair was met once an epoch, once more those that fill the last step."""
    found, met, ends = [], Counter[int](), {-(-PAIRS * epoch // BATCH): epoch for epoch in range(1, steps + 1)}
    for step in range(steps):
        met.update(took[step])
        if epoch := ends.get(step + 1):
            more = Counter({number: epoch for number in range(PAIRS)})
            found.append(met >= more and set((met - more).values()) <= {1} and met.total() == (step + 1) * BATCH)
    assert found, f"{steps} steps of {BATCH} are less than an epoch of {PAIRS}: raise --steps"
    return found


def again(out: Path) -> Iterator[str]:
    """Each step of each try, by its first rank."""
    for path in out.glob("consumed-*-0"):
        yield from path.read_text().splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    folder, chance = given.folder.resolve(), random.Random(given.seed)
    shutil.rmtree(folder, ignore_errors=True)
    store = Store(str(folder / "space"))
    pins, every = draw(store), max(1, given.steps // 40)
    spec = PretrainSpec(
        model=MODEL, batch_pairs=BATCH, steps=given.steps, max_patches=36, checkpoint_every=every, precision="fp32",
        learning_rate=5e-4,  # at 2e-3 this small task multiplies a rounding by ten in every step of its first peak
    )  # fmt: skip
    job = {"store": str(folder / "space"), "shards": pins, "spec": spec}
    configs = {name: TrainConfig(**job, out_dir=str(folder / name)) for name in ("whole", "turns", "two")}
    train(folder, configs["whole"], [(2, "ddp")], [])
    steps_s = sum(line["pairs"] / line["pairs_per_s"] for line in metrics(folder / "whole"))
    kills = [chance.uniform(0, 2) * steps_s / (given.kills + 1) for _ in range(given.kills)]
    ways = [(ranks, parallel) for parallel in ("fsdp", "ddp") for ranks in RANKS]
    train(folder, configs["turns"], ways, kills)
    train(folder, configs["two"], [(2, "ddp")], kills[::2])
    result = compare(folder, store, pins, given.steps)
    print(json.dumps(result, indent=1))
    sys.exit(not all(value for name, value in result.items() if isinstance(value, bool)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        sys.exit(be_rank(sys.argv[2]))
    if sys.argv[1:2] == ["--attempt"]:
        attempt(sys.argv[2])
    else:
        main()
