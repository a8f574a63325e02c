"""Which image stands where on the demo web, under which text, with which defect: everything but the bytes.

Defects are dealt out by one permutation of the scenes, so they fall on disjoint images and their counts are exact.
Copies come on top, as further URLs with clean texts of their own. Every choice of a slot is drawn from a generator
of its own, keyed by (seed, purpose, index): no slot depends on how another one was made.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from pairs.errors import PairmillError
from pipelines.demo import texts
from pipelines.demo.defects import COPY_RATES, RATES, TRAPS
from pipelines.demo.scenes import Scene, sample
from pipelines.demo.texts import Text

HOSTS = tuple(f"127.0.0.{n}" for n in range(11, 16))
SLOW_HOST, DRIP_HOST = "127.0.0.16", "127.0.0.17"
ALL_HOSTS = (*HOSTS, SLOW_HOST, DRIP_HOST)
STREAMS = {name: i for i, name in enumerate(("deal", "scene", "slot", "text", "bytes", "page", "trusted", "eval"))}
PAGE_FOLDERS = {"noai_page": "/studio", "robots_forbidden": "/private"}
PNG_ONLY = ("tiny_icon", "png_bomb")


@dataclass(frozen=True)
class Slot:
    """One image URL of the web. `shown` are the texts beside it by where they stand (alt, caption)."""

    index: int
    scene: Scene
    defect: str | None
    page_host: str
    page_folder: str
    host: str
    path: str
    extension: str
    shown: dict[str, Text]
    truth: str
    copy_of: int | None = None
    text_from: int | None = None


def stream(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    return np.random.default_rng([seed, STREAMS[purpose], index])


def random_name(seed: int, index: int, salt: str = "") -> str:
    """A file name that gives nothing away."""
    return hashlib.sha256(f"{seed}/{index}/{salt}".encode()).hexdigest()[:12]


def deal(seed: int, noise: float, scenes: int, clean: bool) -> tuple[list[str | None], dict[int, str]]:
    """The defect of each scene, and the copies to make: {scene: kind of copy}, in a fixed order."""
    order = [int(i) for i in stream(seed, "deal").permutation(scenes)]
    counts = {} if clean else TRAPS | {name: max(1, round(rate * scenes)) for name, rate in RATES.items()}
    copies = {} if clean else {name: max(1, round(rate * scenes)) for name, rate in COPY_RATES.items()}
    ordinary = scenes - sum(counts.values())
    swapped = round(noise * max(0, ordinary))
    if ordinary - swapped < max(1, sum(copies.values())):
        raise PairmillError(
            expected="enough scenes for every defect and a noise that leaves some texts in place",
            found=f"scenes={scenes}, noise={noise}",
            remedy="take more scenes (100 at least) or less noise (0.8 at most)",
        )
    labels = [name for name, count in (counts | {"swapped": swapped}).items() for _ in range(count)]
    defects: list[str | None] = [None] * scenes
    for i, label in zip(order, labels, strict=False):
        defects[i] = label
    originals = iter(order[len(labels) :])
    return defects, {next(originals): name for name, count in copies.items() for _ in range(count)}


def plan(seed: int, noise: float, scenes: int, clean: bool) -> list[Slot]:
    """All slots, in the order of their index; the copies last."""
    defects, copies = deal(seed, noise, scenes, clean)
    drawn = [sample(stream(seed, "scene", i)) for i in range(scenes)]
    slots = [_slot(seed, i, drawn[i], defects[i]) for i in range(scenes)]
    ordinary = [i for i in range(scenes) if defects[i] in (None, "swapped")]
    slots = [_swap(seed, slot, ordinary, drawn) if slot.defect == "swapped" else slot for slot in slots]
    # Of the forbidden images one half stands on forbidden pages, the other is shown by pages that are not.
    for slot in [slot for slot in slots if slot.defect == "robots_forbidden"][::2]:
        slots[slot.index] = replace(slot, page_folder="")
    for original, kind in copies.items():
        copy = _slot(seed, len(slots), drawn[original], kind, away_from=slots[original].page_host)
        extension = slots[original].extension if kind == "exact_duplicate" else copy.extension
        path = f"{copy.path.rpartition('.')[0]}.{extension}"
        slots.append(replace(copy, copy_of=original, extension=extension, path=path))
    return slots


def _slot(seed: int, index: int, scene: Scene, defect: str | None, away_from: str = "") -> Slot:
    rng = stream(seed, "slot", index)
    extension = "png" if defect in PNG_ONLY else ("jpg", "png", "webp")[int(rng.choice(3, p=[0.7, 0.15, 0.15]))]
    home = texts.pick(rng, [host for host in HOSTS if host != away_from])
    page_host = SLOW_HOST if defect == "slow" else home
    folder = PAGE_FOLDERS.get(defect or "", "")
    path = f"{'/private' if defect == 'robots_forbidden' else '/img'}/{random_name(seed, index)}.{extension}"
    host = DRIP_HOST if defect == "drip" else page_host
    shown, truth = _shown(seed, index, scene, defect), texts.careful(rng, scene).text
    return Slot(index, scene, defect, page_host, folder, host, path, extension, shown, truth)


def _places(rng: np.random.Generator) -> tuple[str, ...]:
    return (("alt",), ("caption",), ("alt", "caption"))[int(rng.choice(3, p=[0.6, 0.2, 0.2]))]


def _shown(seed: int, index: int, scene: Scene, defect: str | None) -> dict[str, Text]:
    rng = stream(seed, "text", index)
    if defect in ("boilerplate", "file_name"):
        return {"alt": texts.boilerplate(rng) if defect == "boilerplate" else texts.file_name(rng)}
    write = texts.foreign if defect == "foreign" else texts.ordinary
    return {place: write(rng, scene) for place in _places(rng)}


def _swap(seed: int, slot: Slot, ordinary: list[int], drawn: list[Scene]) -> Slot:
    """The slot with texts of another scene, none of which is true of its own."""
    rng = stream(seed, "text", slot.index)
    places = _places(rng)
    while True:
        donor = texts.pick(rng, ordinary)
        shown = {place: texts.ordinary(rng, drawn[donor]) for place in places}
        if not any(texts.agrees(text, slot.scene) for text in shown.values()):
            return replace(slot, shown=shown, text_from=donor)
