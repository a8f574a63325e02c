"""A small web on disk, with its ground truth beside it.

    DIR/www/<host>/…            what the server shows; nothing else is ever served
    DIR/routes.json             what only a server can do: redirects, headers, delays
    DIR/trusted/NNNNN.jpg .txt  pictures with careful captions: the trusted source
    DIR/eval/<colour kind>/     clean held-out pictures of one thing each, for zero-shot classification
    DIR/truth/truth.parquet     one row per image URL: texts shown, true caption, defects, what it copies
    DIR/truth/rates.json        the arguments, and the planned and the realised rates

Everything is a function of the arguments alone, to the byte. The web is built beside its place and renamed, so a
directory that exists is complete. Drawn on all cores: about 15 core seconds for 3,700 images.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pairs.errors import PairmillError
from pairs.identity import url_key
from pairs.process import die_with_parent
from pipelines.demo import defects, texts
from pipelines.demo.pages import ROBOTS, Page, layout, write_pages
from pipelines.demo.plan import ALL_HOSTS, HOSTS, SLOW_HOST, Slot, plan, random_name, stream
from pipelines.demo.scenes import COLOURS, KINDS, render, sample

GENERATOR_VERSION = 3  # raise it when the same arguments give other bytes
PER_CLASS = 5
CHUNK = 64  # pictures that a process draws at a time
Routes = dict[str, dict[str, object]]  # by "<host><path>"

TRUTH_SCHEMA = pa.schema(
    [("url", pa.string()), ("url_key", pa.string()), ("host", pa.string()), ("pages", pa.list_(pa.string()))]
    + [(name, pa.string()) for name in ("alt", "caption", "shown_text", "true_caption", "language")]
    + [("defects", pa.list_(pa.string()))]
    + [(name, pa.string()) for name in ("duplicate_of", "text_from", "location", "sha256", "facts")]
    + [("width", pa.int32()), ("height", pa.int32())]
)


@dataclass(frozen=True)
class WebFacts:
    """What was made. `planned` and `realised` are shares: of the ordinary pairs for `swapped`, else of all scenes."""

    directory: Path
    seed_url: str
    port: int
    images: int
    trusted: int
    classes: tuple[str, ...]
    planned: dict[str, float]
    realised: dict[str, float]


def make_web(
    directory: Path,
    seed: int,
    noise: float,
    scenes: int = 2400,
    trusted: int = 1100,
    port: int = 8765,
    clean: bool = False,
    per_class: int = PER_CLASS,
) -> WebFacts:
    """Writes the web, or returns at once if `directory` holds just this one.

    `noise` is the share of swapped texts among the ordinary pairs, 0 to 0.8; `clean` leaves out every other defect
    too. Raises PairmillError if `directory` holds anything else or the numbers leave no room.
    """
    arguments: dict[str, object] = {
        "version": GENERATOR_VERSION,
        "seed": seed,
        "noise": noise,
        "scenes": scenes,
        "trusted": trusted,
    }
    arguments |= {"port": port, "clean": clean, "per_class": per_class}
    _check(noise, clean)
    if directory.exists() and any(directory.iterdir()):
        return _reuse(directory, arguments)
    slots = plan(seed, noise, scenes, clean)
    partial = directory.absolute().with_name(f".{directory.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    _write_pictures(partial, seed, trusted, per_class)
    _write_web(partial, slots, seed, port, clean)
    record = {"arguments": arguments, "images": len(slots)} | _rates(slots, noise, scenes, clean)
    _write(partial / "truth" / "rates.json", json.dumps(record, indent=1))
    partial.replace(directory)
    return _reuse(directory, arguments)


def _check(noise: float, clean: bool) -> None:
    if not 0.0 <= noise <= 0.8 or (clean and noise):
        raise PairmillError(
            expected="a noise between 0 and 0.8, and 0 for a clean web",
            found=f"noise={noise}, clean={clean}",
            remedy="choose one of the two",
        )


def _reuse(directory: Path, arguments: dict[str, object]) -> WebFacts:
    record = directory / "truth" / "rates.json"
    found = json.loads(record.read_text()) if record.exists() else {}
    if found.get("arguments") != arguments:
        raise PairmillError(
            expected=f"an empty directory, or the demo web of {arguments}",
            found=f"{directory} with {found.get('arguments', 'other files')}",
            remedy="name another directory or remove this one",
        )
    port = int(found["arguments"]["port"])
    seed_url, classes = f"http://{HOSTS[0]}:{port}/", tuple(f"{c} {k}" for c in COLOURS for k in KINDS)
    trusted = int(found["arguments"]["trusted"])
    return WebFacts(directory, seed_url, port, found["images"], trusted, classes, found["planned"], found["realised"])


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _write_pictures(root: Path, seed: int, trusted: int, per_class: int) -> None:
    """The trusted pictures with their captions, and the classes of the evaluation."""
    with _pool() as pool:
        for i, (picture, text) in enumerate(pool.map(partial(_trusted, seed), range(trusted), chunksize=CHUNK)):
            _write(root / "trusted" / f"{i:05d}.jpg", picture)
            _write(root / "trusted" / f"{i:05d}.txt", text + "\n")
        classes = [(colour, kind) for colour in COLOURS for kind in KINDS]
        places = [(number, i) for number in range(len(classes)) for i in range(per_class)]
        drawn = pool.map(partial(_of_class, seed, classes), places, chunksize=CHUNK)
        for (number, i), picture in zip(places, drawn, strict=True):
            _write(root / "eval" / " ".join(classes[number]) / f"{i:03d}.png", picture)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=die_with_parent, initargs=(os.getpid(),))


def _trusted(seed: int, i: int) -> tuple[bytes, str]:
    rng = stream(seed, "trusted", i)
    scene = sample(rng)
    return defects.encode(render(scene), "jpg", 92), texts.careful(rng, scene).text


def _of_class(seed: int, classes: list[tuple[str, str]], place: tuple[int, int]) -> bytes:
    number, i = place
    return defects.encode(render(sample(stream(seed, "eval", number * 1000 + i), only=classes[number])), "png", 0)


def _write_web(root: Path, slots: list[Slot], seed: int, port: int, clean: bool) -> None:
    routes: Routes = {}
    hashes: dict[int, str] = {}
    with _pool() as pool:
        served = pool.map(partial(_served, slots, seed, port), slots, chunksize=CHUNK)
        for slot, (target, data, route) in zip(slots, served, strict=True):
            if data is not None:
                _write(root / "www" / target, data)
                hashes[slot.index] = hashlib.sha256(data).hexdigest()
            routes |= route
    pages = layout(slots, seed)
    for (host, path), html in write_pages(pages, seed, port).items():
        _write(root / "www" / host / path.strip("/"), html)
    for host in ALL_HOSTS:
        _write(root / "www" / host / "robots.txt", "User-agent: *\nDisallow:\n" if clean else ROBOTS)
    delays = {} if clean else {SLOW_HOST: defects.SLOW_S}
    _write(root / "routes.json", json.dumps({"port": port, "delay_s": delays, "routes": routes}, indent=1))
    _write_truth(root, slots, pages, hashes, routes, port)


def _served(slots: list[Slot], seed: int, port: int, slot: Slot) -> tuple[str, bytes | None, Routes]:
    """Where the slot's bytes lie below www/, the bytes (None: there are none), and the routes it needs."""
    place = f"{slot.host}{slot.path}"
    other = f"{HOSTS[(HOSTS.index(slot.host) + 1) % len(HOSTS)]}" if slot.host in HOSTS else HOSTS[0]
    moved = f"{other}/img/{random_name(seed, slot.index, 'moved')}.{slot.extension}"
    there, back = f"http://{other}:{port}{moved[len(other) :]}", f"http://{slot.host}:{port}{slot.path}"
    bombs = {"png_bomb": defects.png_bomb, "gzip_bomb": defects.gzip_bomb}
    routes: dict[str | None, Routes] = {
        "redirect": {place: {"status": 301, "location": there}},
        "redirect_loop": {place: {"status": 302, "location": there}, moved: {"status": 302, "location": back}},
        "redirect_private": {place: {"status": 302, "location": defects.PRIVATE_TARGET}},
        "noai_header": {place: {"headers": {"X-Robots-Tag": "noai"}}},
        "gzip_bomb": {place: {"headers": {"Content-Encoding": "gzip"}}},
        "drip": {place: {"drip_s": defects.DRIP_S}},
    }
    route = routes.get(slot.defect, {})
    if slot.defect in ("not_found", "redirect_loop", "redirect_private"):
        return place, None, route
    if slot.defect in bombs:
        return place, bombs[slot.defect](), route
    return moved if slot.defect == "redirect" else place, _image(slot, slots, seed), route


def _image(slot: Slot, slots: list[Slot], seed: int) -> bytes:
    if slot.defect == "exact_duplicate" and slot.copy_of is not None:
        return _image(slots[slot.copy_of], slots, seed)
    rng = stream(seed, "bytes", slot.index)
    quality = int(rng.integers(75, 96))
    picture = render(slot.scene)
    change = {"near_duplicate": defects.near_copy, "tiny_icon": defects.icon}.get(slot.defect or "")
    data = defects.encode(change(picture, rng) if change else picture, slot.extension, quality)
    if slot.defect == "broken":
        return defects.broken(rng)
    if slot.defect == "drip":
        return data[: defects.DRIP_BYTES]
    return defects.truncated(data, rng) if slot.defect == "truncated" else data


def _write_truth(
    root: Path,
    slots: list[Slot],
    pages: dict[Page, list[Slot]],
    hashes: dict[int, str],
    routes: Routes,
    port: int,
) -> None:
    urls = [f"http://{slot.host}:{port}{slot.path}" for slot in slots]
    shown_on: dict[int, list[str]] = {slot.index: [] for slot in slots}
    for (host, path), on_page in pages.items():
        for slot in on_page:
            shown_on[slot.index].append(f"http://{host}:{port}{path}")
    rows = []
    for slot, url in zip(slots, urls, strict=True):
        shown = {place: text.text for place, text in slot.shown.items()}
        first = next(iter(slot.shown.values()))
        rows.append(
            {
                "url": url,
                "url_key": url_key(url),
                "host": slot.host,
                "pages": shown_on[slot.index],
                "alt": shown.get("alt"),
                "caption": shown.get("caption"),
                "shown_text": first.text,
                "true_caption": slot.truth,
                "language": first.language,
                "defects": [slot.defect] if slot.defect else [],
                "duplicate_of": None if slot.copy_of is None else urls[slot.copy_of],
                "text_from": None if slot.text_from is None else urls[slot.text_from],
                "location": routes.get(f"{slot.host}{slot.path}", {}).get("location"),
                "sha256": hashes.get(slot.index),
                "facts": slot.scene.facts(),
                "width": slot.scene.width,
                "height": slot.scene.height,
            }
        )
    (root / "truth").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=TRUTH_SCHEMA), root / "truth" / "truth.parquet")


def _rates(slots: list[Slot], noise: float, scenes: int, clean: bool) -> dict[str, dict[str, float]]:
    found = Counter(slot.defect for slot in slots)
    ordinary = found[None] + found["swapped"]
    planned = {"swapped": noise}
    if not clean:
        planned |= defects.RATES | defects.COPY_RATES | {name: n / scenes for name, n in defects.TRAPS.items()}
    realised = {name: found[name] / (ordinary if name == "swapped" else scenes) for name in planned}
    return {"planned": planned, "realised": realised}
