"""Real pairs as a folder of images with captions: clip-art (Debian's `openclipart-png` with the titles of
`openclipart-svg`, public domain) and stamps (`tuxpaint-stamps-default`, photographs and drawings, GPL-2).

    apt-get download openclipart-png openclipart-svg tuxpaint-stamps-default
    for f in *.deb; do dpkg -x $f packages; done
    python benchmarks/real_pairs.py packages FOLDER

Each becomes `<name>.jpg` (longer side at most 512 px, alpha onto white, quality 95) and `<name>.txt`. Pictures above 50
megapixels and those without a title are left out and counted. About 4 minutes on one core.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from defusedxml import ElementTree
from defusedxml.common import DefusedXmlException
from PIL import Image
from stamps_web import stamps

from pairs.identity import local_key, make_uid, sha256_hex
from pairs.schemas import TRAINING
from pairs.shard import ShardRef, write_shard
from pairs.store import Store, table_metadata
from training.config import Pin

SIDE_PX, MAX_PIXELS = 512, 50_000_000
TITLE = "{http://purl.org/dc/elements/1.1/}title"


def clip_art(packages: Path) -> Iterator[tuple[Path, str]]:
    """(PNG, title) of each picture; the title is empty where its SVG tells none."""
    root = packages / "usr/share/openclipart"
    for image in sorted((root / "png").rglob("*.png")):
        drawing = (root / "svg" / image.relative_to(root / "png")).with_suffix(".svg")
        try:
            first = ElementTree.parse(drawing).find(f".//{TITLE}")
        except (ElementTree.ParseError, DefusedXmlException, OSError):
            first = None
        yield image, " ".join((first.text or "").split()) if first is not None else ""


def flatten(path: Path) -> Image.Image | None:
    """The picture on white, at most `SIDE_PX` wide and high; None where it is too large or doesn't open."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
            rgba = image.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return None
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def write(packages: Path, folder: Path) -> dict[str, int]:
    """Writes the pairs; returns how many of each kind there are, and what was left out."""
    folder.mkdir(parents=True, exist_ok=True)
    told: Counter[str] = Counter()
    Image.MAX_IMAGE_PIXELS = None
    for kind, pairs in {"clipart": clip_art(packages), "stamp": iter(stamps(packages))}.items():
        for number, (path, text) in enumerate(pairs):
            image = flatten(path) if text else None
            told[kind if image else f"{kind} without title" if not text else f"{kind} not opened"] += 1
            if image is not None:
                name = f"{kind}-{number:05d}"
                image.save(folder / f"{name}.jpg", quality=95)
                (folder / f"{name}.txt").write_text(text + "\n")
    return dict(told)


def as_shards(folder: Path, store: Store, each: int = 1000) -> list[Pin]:
    """The pairs of a folder as training shards, a source for each kind."""
    pins = []
    for kind in ("clipart", "stamp"):
        images = sorted(folder.glob(f"{kind}-*.jpg"))
        for index, start in enumerate(range(0, len(images), each)):
            ref = ShardRef(f"shards/{kind}-0123456789ab/0000", index)
            write_shard(store, ref, map(_row, images[start : start + each]), TRAINING)
            sha256 = table_metadata(store.read_table(ref.table))["tar_sha256"]
            pins.append(Pin(folder=ref.folder, index=ref.index, tar_sha256=sha256))
    return pins


def _row(path: Path) -> tuple[dict[str, object], bytes]:
    data, text, key = path.read_bytes(), path.with_suffix(".txt").read_text().strip(), local_key("real", path.name)
    with Image.open(path) as image:
        width, height = image.size
    row = {"uid": make_uid(key, sha256_hex(data)), "url_key": key, "status": "ok", "text": text, "texts": []}
    return row | {"width": width, "height": height, "image_ext": "jpg"}, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="the folder that the Debian packages were unpacked into")
    parser.add_argument("folder", type=Path, help="where the pairs are written")
    arguments = parser.parse_args()
    print(json.dumps(write(arguments.packages, arguments.folder)))


if __name__ == "__main__":
    main()
