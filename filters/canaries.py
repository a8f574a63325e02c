"""Canaries: pairs with a planted defect (`filters.defects`), each beside an untouched twin that was encoded alike.

They are made from trusted pairs that aren't held out, or from any pair where a run has no trusted source, chosen by
hash, and lie in shards of their own (`canaries/<defect>-<fingerprint>/0000/`), which no selection and no training shard
reads. What each one is stands in a table like a score's (`canary_facts`). All defects share one set of origins. Half of
the canaries (by hash) may fit something, the other half reports. Origins are chosen column by column, so planning costs
a second for a million pairs; the pairs themselves are read only for those that are chosen.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.columns import as_bool, load_frame, read_columns
from filters.defects import DEFECTS, Given, Planted
from pairs.fingerprint import fingerprint
from pairs.identity import local_key, make_uid, sha256_hex, unit_hash
from pairs.recipe import CanariesSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import Store
from pairs.uid_lists import halves

VERSION = 3  # raise it when the same pairs would give other canaries
FACTS = pa.schema(
    [
        ("uid", pa.string()),
        ("defect", pa.string()),
        ("twin", pa.bool_()),
        ("origin", pa.string()),  # uid of the pair that it is made from
        ("half", pa.string()),  # fit or report
        ("kind", pa.string()),  # of the defect
        ("how", pa.string()),
    ]
)
AS_FOUND = ("original_width", "original_height", "original_format", "original_bytes", "sha256", "width", "height")
READ = ("text", "texts", "image_ext", "image_offset", "image_size", *AS_FOUND)


@dataclass(frozen=True)
class Origin:
    """A pair that canaries are made from; `row` holds the fields of `READ`."""

    uid: str
    shard: ShardRef
    row: Mapping[str, Any] = field(hash=False)

    def image(self, store: Store) -> bytes:
        """The stored image, as it was encoded."""
        return store.read(self.shard.tar, self.row["image_offset"], self.row["image_size"])


def make_canaries(
    store: Store,
    shards: Mapping[str, Sequence[ShardRef]],
    trusted: Sequence[str],
    spec: CanariesSpec,
    seed: int,
    only: Collection[str] | None = None,
) -> list[ShardRef]:
    """The canary shards, one per defect, all made from the same pairs; what exists is left. At most `per_defect`
    canaries a defect, at most `max_fraction` of the pairs of the trusted sources (of all, where there are none), and of
    the uids `only` where these are given."""
    of = {name: refs for name, refs in shards.items() if name in trusted or not trusted}
    chosen = _origins(store, of, trusted, spec, seed, only) if spec.per_defect else []
    partners = [_partner(chosen, origin, seed) for origin in chosen]
    plan = list(zip(chosen, partners, strict=True))
    return [_publish(store, name, plan, seed) for name in DEFECTS if plan and name in (spec.defects or DEFECTS)]


def set_apart(store: Store, refs: Sequence[ShardRef]) -> list[str]:
    """uids of the pairs that the canaries in `refs` are made from, swapped texts included. A model that is
    asked about them must not have trained on them, or false drops are flattered and an older model always wins."""
    return sorted({origin for ref in refs for origin in facts(store, ref)["origin"].to_pylist()})


def facts(store: Store, ref: ShardRef) -> pa.Table:
    """What each row of a canary shard is (`FACTS`)."""
    return store.read_table(facts_path(ref)).cast(FACTS)


def defect_of(ref: ShardRef) -> str:
    """The defect of a canary shard."""
    return ref.group.rsplit("-", 1)[0]


def reporting(facts: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Where canaries of the half that reports stand, and where their twins."""
    return _half(facts, "report")


def _half(facts: pa.Table, half: str) -> tuple[np.ndarray, np.ndarray]:
    mine, twin = as_bool(pc.equal(facts["half"], half)), as_bool(facts["twin"])
    return mine & ~twin, mine & twin


def fitting(
    store: Store, refs: Sequence[ShardRef], defect: str, column: str, scores: Mapping[str, str], twins: bool = False
) -> pa.ChunkedArray:
    """A score column of a defect's canaries, or `twins`, that thresholds may be fitted to; empty without any."""
    parts = [pa.chunked_array([], pa.float64())]
    for ref in (ref for ref in refs if defect_of(ref) == defect):
        mine = pa.array(_half(facts(store, ref), "fit")[twins])
        parts.append(read_columns(store, ref, [column], scores)[column].filter(mine))
    return parts[-1]


def facts_path(ref: ShardRef) -> str:
    """Where the facts (`FACTS`) of a canary shard lie, row by row."""
    return ref.beside(f"scores/canary_facts-{ref.group.rsplit('-', 1)[1]}")


def _origins(
    store: Store,
    shards: Mapping[str, Sequence[ShardRef]],
    trusted: Sequence[str],
    spec: CanariesSpec,
    seed: int,
    only: Collection[str] | None,
) -> list[Origin]:
    """The chosen pairs, in the order of a hash of seed and uid."""
    frame = load_frame(store, shards, ["pairs.text"], {}, trusted)
    written = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(frame.table["pairs.text"].cast(pa.string()))), 0)
    rows = np.flatnonzero(frame.alive & ~frame.held_out & as_bool(written))
    count = min(spec.per_defect, int(spec.max_fraction * len(rows)))
    uids = frame.table["uid"].take(pa.array(rows))
    if only is not None:
        allowed = as_bool(pc.is_in(uids, pa.array(sorted(only), pa.string())))
        rows, uids = rows[allowed], uids.filter(pa.array(allowed))
    odd = np.uint64(int(unit_hash(seed, "canary") * 2**52) * 2 + 1)
    chosen = rows[np.argsort(halves(uids)[0] * odd, kind="stable")[:count]]
    place = np.searchsorted(frame.starts, chosen, "right") - 1
    found: dict[int, Origin] = {}
    for shard in np.unique(place):
        ref, mine = frame.shards[shard][1], chosen[place == shard]
        table = read_columns(store, ref, [f"pairs.{name}" for name in READ], {})
        for row, values in zip(mine, table.take(pa.array(mine - frame.starts[shard])).to_pylist(), strict=True):
            found[row] = Origin(values["uid"], ref, {name: values[f"pairs.{name}"] for name in READ})
    return [found[row] for row in chosen]


def _words(origin: Origin) -> set[str]:
    return set(str(origin.row["text"]).casefold().split())


def _partner(origins: Sequence[Origin], origin: Origin, seed: int) -> Origin | None:
    """Another origin, by hash, whose text has other words than this one's; None where there is none."""
    start = int(unit_hash(seed, "partner", origin.uid) * len(origins))
    turned = (origins[(start + step) % len(origins)] for step in range(len(origins)))
    return next((other for other in turned if _words(other) != _words(origin)), None)


def _publish(store: Store, defect: str, plan: Sequence[tuple[Origin, Origin | None]], seed: int) -> ShardRef:
    lineage = [[o.uid, o.shard.group, o.row["text"], p.row["text"] if p else None] for o, p in plan]
    name = f"{defect}-{fingerprint({'defect': defect, 'version': VERSION, 'seed': seed, 'plan': lineage})}"
    ref = ShardRef(f"canaries/{name}/0000", 0)
    if store.has(ref.table) and store.has(facts_path(ref)):
        return ref
    rows, told = [], []
    for origin, partner in plan:
        data = origin.image(store)
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            continue
        language = next((text["language"] for text in origin.row["texts"] or []), None)
        given = Given(origin.uid, seed, pixels, language, partner.row["text"] if partner else None)
        if (planted := DEFECTS[defect].plant(given)) is None:
            continue
        half = "fit" if unit_hash(seed, "half", defect, origin.uid) < 0.5 else "report"
        for twin in (False, True):
            row, image = _pair(defect, origin, planted, data, twin)
            rows.append((row, image))
            fact = {"uid": row["uid"], "defect": defect, "twin": twin, "origin": origin.uid, "half": half}
            told.append(fact | {"kind": planted.kind, "how": planted.how})
    write_shard(store, ref, rows, PAIRS)
    store.write_table(facts_path(ref), pa.Table.from_pylist(told, schema=FACTS))
    return ref


def _pair(defect: str, origin: Origin, planted: Planted, stored: bytes, twin: bool) -> tuple[dict[str, object], bytes]:
    """The row and the image of a canary, or of its twin."""
    row = {name: origin.row[name] for name in (*AS_FOUND, "image_ext")} | {"source_uid": origin.uid, "status": "ok"}
    text = origin.row["text"] if twin or planted.text is None else planted.text
    row |= {"text": text, "texts": [{"text": text, "kind": "alt", "language": None}]}
    pixels = planted.twin if twin and planted.twin is not None else planted.pixels
    image = stored
    if pixels is not None:
        image = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, planted.quality])[1].tobytes()
        row |= {"original_format": "jpeg", "original_bytes": len(image), "sha256": sha256_hex(image)}
        row |= {"width": pixels.shape[1], "height": pixels.shape[0], "image_ext": "jpg"}
    key = local_key(f"canary {defect}", f"{origin.uid} {'twin' if twin else 'canary'}")
    ids = {"uid": make_uid(key, str(row["sha256"])), "url_key": key, "url": f"canary:{defect}/{origin.uid}"}
    return row | ids, image
