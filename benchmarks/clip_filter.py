"""What the `clip` filter costs beyond decoding and the model's forward pass: total / (decode alone + forward alone).

    python benchmarks/clip_filter.py FOLDER [--pairs 512] [--repeats 5] [--model ViT-B-32] [--batch 64] [--side 256]

Draws pairs (JPEG, two texts each), saves random weights of the model in open_clip's format, and measures in turn,
warm, in one process: decoding all images (cv2, one thread); the forward passes alone, on batches that lie ready on the
device; and the filter itself, from the shard on disk to the published table. Prints JSON: seconds of each repeat, and
the ratio's median and spread. With a GPU the model runs there. Nothing else should run beside it; where something does,
the ratio of this process's CPU seconds says more (not with a GPU, whose work they leave out).
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from cluster.compute import one_thread
from filters import clip_model
from filters.clip import Clip
from filters.engine import plan, score_shards
from filters.images import decode
from pairs.identity import make_uid, sha256_hex, url_key
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, list_shards, read_shard, write_shard
from pairs.store import Store

WORDS = [
    "a red boat",
    "on",
    "the quiet lake",
    "two cats",
    "sleeping in",
    "garden",
    "old house",
    "blue door",
    "photo of",
]


def draw(number: int, side: int) -> bytes:
    """A JPEG with a photograph's share of detail; the shorter side is `side` pixels."""
    chance = np.random.default_rng(number)
    shape = (side, int(side * chance.uniform(1, 1.5)))
    coarse = chance.integers(0, 256, (shape[0] // 8, shape[1] // 8, 3), np.uint8)
    image = cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC).astype(np.int16)
    noisy = np.clip(image + chance.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)
    return bytes(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])[1])


def make_pairs(store: Store, pairs: int, side: int) -> ShardRef:
    """One shard of drawn pairs, made once per folder and size."""
    ref = ShardRef(f"pairs/drawn-{side:012d}/{pairs:04d}", 0)
    if ref in list_shards(store, ref.folder):
        return ref
    rows = []
    for number in range(pairs):
        data, chance = draw(number, side), np.random.default_rng(number)
        texts = [" ".join(chance.choice(WORDS, int(chance.integers(2, 8)))) + f" {number}" for _ in range(2)]
        key, shape = url_key(f"http://example.org/{number}"), cv2.imdecode(np.frombuffer(data, np.uint8), 1).shape
        row = dict.fromkeys(PAIRS.names) | {
            "uid": make_uid(key, sha256_hex(data)), "url_key": key, "text": texts[0], "status": "ok",
            "texts": [{"text": t, "kind": "alt", "language": None} for t in texts], "image_ext": "jpg",
            "width": shape[1], "height": shape[0],
        }  # fmt: skip
        rows.append((row, data))
    write_shard(store, ref, rows, PAIRS)
    return ref


def save_weights(name: str, folder: Path) -> str:
    """Random weights of `name` in a folder that open_clip loads."""
    import open_clip
    from safetensors.torch import save_file

    if not (folder / "open_clip_model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        model = open_clip.create_model(name)
        told = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": model.visual.preprocess_cfg}
        (folder / "open_clip_config.json").write_text(json.dumps(told))
        save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()},
            folder / "open_clip_model.safetensors",
        )
    return str(folder)


def forward_alone(clip: Clip, images: list[np.ndarray], texts: list[str]) -> Callable[[], None]:
    """The model's passes over batches that lie ready: nothing is prepared, tokenised or kept."""
    model = clip_model.load(clip.model, clip.weights, clip.precision)
    pixels = torch.stack([clip_model.prepare(image, model.preprocess) for image in images])
    tokens = model.tokenizer(texts).to(model.device)
    ready = (pixels.float() / 255 - 0.5).to(model.device, model.precision)

    @torch.inference_mode()
    def run() -> None:
        for at in range(0, len(ready), clip.batch_size):
            model.model.encode_image(ready[at : at + clip.batch_size])
        for at in range(0, len(tokens), clip.batch_size):
            model.model.encode_text(tokens[at : at + clip.batch_size])
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    started = time.perf_counter(), time.process_time()
    work()
    return round(time.perf_counter() - started[0], 4), round(time.process_time() - started[1], 4)


def ratios(found: dict[str, list[tuple[float, float]]], clock: int) -> dict[str, float]:
    """Total over the sum of its parts, repeat by repeat."""
    rows = zip(*(found[name] for name in ("total", "decode", "forward")), strict=True)
    values = [t[clock] / (d[clock] + f[clock]) for t, d, f in rows]
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, value in (("pairs", 512), ("repeats", 5), ("batch", 64), ("side", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--model", default="ViT-B-32")
    asked = parser.parse_args()
    store = Store(asked.folder.resolve())
    ref = make_pairs(store, asked.pairs, asked.side)
    weights = save_weights(asked.model, asked.folder.resolve() / "weights" / asked.model)
    clip = Clip(asked.model, weights, "bf16", asked.batch)
    planned = plan({"clip": clip})
    shard = read_shard(store, ref)
    encoded = [image for image in shard.images() if image]
    texts = [entry["text"] for row in shard.table["texts"].to_pylist() for entry in row]
    images = [image for image in map(decode, encoded) if image is not None]
    last: list[Any] = []

    def whole() -> None:
        store.delete(planned[0].folder, recursive=True)
        last[:] = [score_shards(store, planned, [ref], engine="inline", workers=1)]

    work = {
        "decode": lambda: [decode(data) for data in encoded],
        "forward": forward_alone(clip, images, texts),
        "total": whole,
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    with one_thread():
        for _ in range(asked.repeats + 1):
            for name, one in work.items():
                found[name].append(seconds(one))
    found = {name: values[1:] for name, values in found.items()}  # the first repeat warms up
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    told = {"pairs": asked.pairs, "texts": len(texts), "model": asked.model, "device": device}
    told |= {"seconds_and_cpu_seconds": found, "ratio": ratios(found, 0), "cpu_ratio": ratios(found, 1)}
    told |= {"waited_for_images_s": last[0].waited_s}
    told |= {"pairs_per_s": asked.pairs / statistics.median(wall for wall, _ in found["total"])}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
