"""Canaries: pairs with a planted defect, each beside an untouched twin that went through the same re-encoding.

They are made from trusted pairs that aren't held out, chosen by hash, and lie in shards of their own
(`canaries/<defect>-<fingerprint>/0000/`), which no selection and no training shard reads. What each one is stands in
a table like a score's (`canary_facts`): defect, twin, origin, half, how. Half of them (by hash) may fit something,
the other half reports. Cost: one decoding and one encoding per canary.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from filters.columns import load_frame
from pairs.fingerprint import fingerprint
from pairs.identity import local_key, make_uid, sha256_hex, unit_hash
from pairs.recipe import CanariesSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import Store

VERSION = 2  # raise it when the same trusted pairs would give other canaries
FACTS = pa.schema(
    [
        ("uid", pa.string()),
        ("defect", pa.string()),
        ("twin", pa.bool_()),
        ("origin", pa.string()),  # uid of the trusted pair
        ("half", pa.string()),  # fit or report
        ("how", pa.string()),
    ]
)
READ = ("text", "texts", "url", "image_ext", "image_offset", "image_size", "original_width", "original_height")


@dataclass(frozen=True)
class Origin:
    """A trusted pair that a canary is made from; `row` holds the fields of `READ`."""

    uid: str
    shard: ShardRef
    row: Mapping[str, Any] = field(hash=False)

    def picture(self, store: Store) -> np.ndarray | None:
        """HxWx3 uint8 BGR, or None where the image doesn't decode."""
        data = store.read(self.shard.tar, self.row["image_offset"], self.row["image_size"])
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


def make_canaries(
    store: Store,
    shards: Mapping[str, Sequence[ShardRef]],
    trusted: Sequence[str],
    spec: CanariesSpec,
    seed: int,
    only: Collection[str] | None = None,
) -> list[ShardRef]:
    """The canary shards, one per defect, all made from the same pairs; what exists is left. Empty where there are no
    trusted pairs or none are asked for. At most `per_defect` canaries a defect, at most `max_fraction` of the trusted
    pairs, and of the uids `only` where these are given."""
    origins = _origins(store, {name: refs for name, refs in shards.items() if name in trusted}, trusted)
    count = min(spec.per_defect, int(spec.max_fraction * len(origins)))
    refs, wanted = [], None if only is None else frozenset(only)
    allowed = [origin for origin in origins if wanted is None or origin.uid in wanted]
    chosen = sorted(allowed, key=lambda origin: unit_hash(seed, "canary", origin.uid))[:count]
    partners = [_partner(chosen, origin, seed) for origin in chosen]
    for defect, plant in DEFECTS.items():
        plan = [(o, p) for o, p in zip(chosen, partners, strict=True) if p is not None or defect != "swapped_text"]
        if plan:
            refs.append(_publish(store, defect, plan, plant, seed))
    return refs


def set_apart(store: Store, refs: Sequence[ShardRef]) -> list[str]:
    """uids of the trusted pairs that the canaries in `refs` are made from, swapped texts included. A model that is
    asked about them must not have trained on them, or false drops are flattered and an older model always wins."""
    return sorted({origin for ref in refs for origin in facts(store, ref)["origin"].to_pylist()})


def facts(store: Store, ref: ShardRef) -> pa.Table:
    """What each row of a canary shard is (`FACTS`)."""
    return store.read_table(facts_path(ref)).cast(FACTS)


def reporting(facts: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Where canaries of the half that reports stand, and where their twins."""
    reports = np.array(facts["half"].to_pylist()) == "report"
    twin = np.array(facts["twin"].to_pylist(), bool)
    return reports & ~twin, reports & twin


def facts_path(ref: ShardRef) -> str:
    """Where the facts (`FACTS`) of a canary shard lie, row by row."""
    return ref.beside(f"scores/canary_facts-{ref.group.rsplit('-', 1)[1]}")


def _origins(store: Store, shards: Mapping[str, Sequence[ShardRef]], trusted: Sequence[str]) -> list[Origin]:
    frame = load_frame(store, shards, [f"pairs.{name}" for name in READ], {}, trusted)
    usable = frame.alive & ~frame.held_out
    place = np.repeat(np.arange(len(frame.shards)), np.diff(frame.starts))
    found: list[Origin] = []
    rows = np.flatnonzero(usable)
    for row, values in zip(rows, frame.table.take(rows).to_pylist(), strict=True):
        fields = {name: values[f"pairs.{name}"] for name in READ}
        if (fields["text"] or "").strip():
            found.append(Origin(values["uid"], frame.shards[place[row]][1], fields))
    return sorted(found, key=lambda origin: origin.uid)


def _words(origin: Origin) -> set[str]:
    return set(str(origin.row["text"]).casefold().split())


def _partner(origins: Sequence[Origin], origin: Origin, seed: int) -> Origin | None:
    """A trusted pair, by hash, whose text has other words than this one's; None where there is none."""
    start = int(unit_hash(seed, "partner", origin.uid) * len(origins))
    turned = (origins[(start + step) % len(origins)] for step in range(len(origins)))
    return next((other for other in turned if _words(other) != _words(origin)), None)


Plan = Sequence[tuple[Origin, Origin | None]]
Planted = tuple[np.ndarray, int, str]  # the copy's pixels (BGR), its JPEG quality, how it was made


def _same(origin: Origin, pixels: np.ndarray, seed: int) -> Planted:
    return pixels, 90, "re-encoded"


def _copy(origin: Origin, pixels: np.ndarray, seed: int) -> Planted:
    """Resized to 60 to 95 %, re-encoded at quality 50 to 80, or cropped by 1 to 3 % of each side."""
    kind, draw = unit_hash(seed, "how", origin.uid), unit_hash(seed, "how much", origin.uid)
    height, width = pixels.shape[:2]
    if kind < 1 / 3:
        scale = 0.6 + 0.35 * draw
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), 90, f"resized to {scale:.2f}"
    if kind < 2 / 3:
        return pixels, round(50 + 30 * draw), "re-encoded at low quality"
    cut = 0.01 + 0.02 * draw
    top, left = round(height * cut), round(width * cut)
    return pixels[top : height - top, left : width - left], 90, f"cropped by {cut:.3f} of each side"


DEFECTS: dict[str, Callable[[Origin, np.ndarray, int], Planted]] = {"swapped_text": _same, "near_duplicate": _copy}


def _publish(
    store: Store, defect: str, plan: Plan, plant: Callable[[Origin, np.ndarray, int], Planted], seed: int
) -> ShardRef:
    lineage = [[o.uid, o.shard.group, o.row["text"], p.row["text"] if p else None] for o, p in plan]
    name = f"{defect}-{fingerprint({'defect': defect, 'version': VERSION, 'seed': seed, 'plan': lineage})}"
    ref = ShardRef(f"canaries/{name}/0000", 0)
    if store.has(ref.table) and store.has(facts_path(ref)):
        return ref
    rows, told = [], []
    for origin, partner in plan:
        pixels = origin.picture(store)
        if pixels is None:
            continue
        copy, quality, how = plant(origin, pixels, seed)
        half = "fit" if unit_hash(seed, "half", defect, origin.uid) < 0.5 else "report"
        for twin in (False, True):
            text = partner.row["text"] if defect == "swapped_text" and partner and not twin else origin.row["text"]
            row, data = _pair(defect, origin, copy, quality, text, twin)
            rows.append((row, data))
            told.append(
                {"uid": row["uid"], "defect": defect, "twin": twin, "origin": origin.uid, "half": half, "how": how}
            )
    write_shard(store, ref, rows, PAIRS)
    store.write_table(facts_path(ref), pa.Table.from_pylist(told, schema=FACTS))
    return ref


def _pair(
    defect: str, origin: Origin, pixels: np.ndarray, quality: int, text: str, twin: bool
) -> tuple[dict[str, object], bytes]:
    data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    key, sha256 = local_key(f"canary {defect}", f"{origin.uid} {'twin' if twin else 'canary'}"), sha256_hex(data)
    height, width = pixels.shape[:2]
    row: dict[str, object] = {"uid": make_uid(key, sha256), "url_key": key, "url": f"canary:{defect}/{origin.uid}"}
    row |= {"text": text, "texts": [{"text": text, "kind": "alt", "language": None}], "source_uid": origin.uid}
    row |= {"status": "ok", "width": width, "height": height, "image_ext": "jpg", "sha256": sha256}
    row |= {name: origin.row[name] for name in ("original_width", "original_height")}
    return row | {"original_format": "jpeg", "original_bytes": len(data)}, data
