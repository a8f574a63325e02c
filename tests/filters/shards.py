"""Small pair shards for the filters' tests: drawn images and texts, with the awkward rows that real ones have."""

import cv2
import numpy as np

from pairs.identity import make_uid, sha256_hex, url_key
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import Store

TEXTS = ("a red boat on a quiet lake", "IMG_2041.JPG", "zwei Katzen schlafen im Garten", "", None, "看看这个", "a\n b")
FOLDER = "pairs/web-0123456789ab/0000"


def draw(seed: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth background with a few rectangles, HxWx3 uint8 RGB."""
    chance = np.random.default_rng(seed)
    image = cv2.resize(chance.integers(0, 256, (4, 4, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(3):
        x, y = chance.integers(0, width - 8), chance.integers(0, height - 8)
        colour = tuple(int(c) for c in chance.integers(0, 256, 3))
        cv2.rectangle(image, (int(x), int(y)), (int(x) + 12, int(y) + 9), colour, -1)
    return image


def encode(image: np.ndarray, ext: str = "png") -> bytes:
    return cv2.imencode(f".{ext}", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def pair(number: int, *, image: bytes | None = None, text: str | None = None) -> tuple[dict[str, object], bytes]:
    data = encode(draw(number)) if image is None else image
    key = url_key(f"http://example.org/{number}.png")
    texts = [{"text": t, "kind": "alt", "language": None} for t in (text, f"picture {number}") if t is not None]
    row = dict.fromkeys(PAIRS.names) | {
        "uid": make_uid(key, sha256_hex(data)), "url_key": key, "text": text, "texts": texts, "status": "ok",
        "width": 64, "height": 48, "original_width": 640, "original_height": 480, "original_bytes": len(data),
        "sha256": sha256_hex(data), "image_ext": "png",
    }  # fmt: skip
    return row, data


def write_shards(store: Store, sizes: tuple[int, ...] = (8, 5), folder: str = FOLDER) -> list[ShardRef]:
    """Shards of drawn pairs; the third pair of each is no image, the fourth is forgotten."""
    refs = []
    for index, size in enumerate(sizes):
        rows = []
        for i in range(size):
            number = index * 1000 + i
            row, data = pair(number, text=TEXTS[i % len(TEXTS)], image=b"no image" if i == 2 else None)
            rows.append((row | {"status": "forgotten" if i == 3 else "ok"}, data))
        refs.append(ShardRef(folder, index))
        write_shard(store, refs[-1], rows, PAIRS)
    return refs
