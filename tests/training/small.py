"""Training shards of a few drawn pictures: a coloured box on grey, at several aspects, with a text that names it."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pairs.identity import local_key, make_uid, sha256_hex
from pairs.pretrain import ModelSpec, PretrainSpec, TowerSpec
from pairs.schemas import TRAINING
from pairs.shard import ShardRef, write_shard
from pairs.store import Store, table_metadata
from training.config import Pin, TrainConfig

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (230, 220, 20)}
PLACES = ("left", "right", "top", "bottom")
SIZES = ((96, 64), (64, 96), (80, 80), (120, 60))
MODEL = ModelSpec(
    embed_dim=32,
    image_px=32,
    patch_px=8,
    vision=TowerSpec(layers=2, width=32, heads=2),
    text=TowerSpec(layers=2, width=32, heads=2),
    context=16,
)
SPEC = PretrainSpec(
    model=MODEL,
    batch_pairs=16,
    steps=8,
    max_patches=16,
    warmup_steps=2,
    checkpoint_every=3,
    workers=1,
    precision="fp32",
)


def picture(i: int) -> np.ndarray:
    """(height, width, 3) RGB."""
    width, height = SIZES[i % 4]
    image = np.full((height, width, 3), 150 + i % 40, np.uint8)
    colour, place = list(COLOURS.values())[i % 4], i // 4 % 4
    x, y = ((1, 2), (3, 2), (2, 1), (2, 3))[place]
    centre, r = (width * x // 4, height * y // 4), min(width, height) // 6
    cv2.rectangle(image, (centre[0] - r, centre[1] - r), (centre[0] + r, centre[1] + r), colour, -1)
    return image


def encoded(image: np.ndarray, ext: str = ".png") -> bytes:
    return bytes(cv2.imencode(ext, image[:, :, ::-1])[1].tobytes())


def pair(i: int) -> tuple[dict[str, Any], bytes]:
    data = encoded(picture(i))
    key = local_key("drawn", f"{i}.png")
    names = [f"a {list(COLOURS)[i % 4]} box at the {PLACES[i // 4 % 4]}", f"number {i} of the drawings"]
    texts = [{"text": t, "kind": "alt", "language": "en", "probability": None} for t in names[: 1 + i % 2]]
    width, height = SIZES[i % 4]
    row = {"uid": make_uid(key, sha256_hex(data)), "url_key": key, "source": "drawn", "increment": "0000"}
    row |= {"trusted": False, "status": "ok", "text": names[0], "texts": texts, "image_ext": "png"}
    return row | {"width": width, "height": height}, data


def shards(store: Store, count: int = 60, each: int = 24, source: str = "all", first: int = 0) -> list[Pin]:
    """`count` pairs from `first` on in shards of `each`, the last one uneven."""
    pins = []
    for index, start in enumerate(range(first, first + count, each)):
        ref = ShardRef(f"shards/{source}-0123456789ab/0000", index)
        write_shard(store, ref, (pair(i) for i in range(start, min(first + count, start + each))), TRAINING)
        pins.append(pin(store, ref))
    return pins


def pin(store: Store, ref: ShardRef) -> Pin:
    return Pin(folder=ref.folder, index=ref.index, tar_sha256=table_metadata(store.read_table(ref.table))["tar_sha256"])


def config(root: Path, out: str, **changes: Any) -> TrainConfig:
    store = Store(root)
    pins = shards(store)
    return TrainConfig(
        store=str(root), shards=pins, spec=SPEC.model_copy(update=changes), out_dir=str(root / "runs" / out)
    )
