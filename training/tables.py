"""From training tables to a Plan: what may be trained on, with every row that is left out counted by reason."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairs.errors import PairmillError
from pairs.fingerprint import fingerprint
from pairs.pretrain import PretrainSpec
from pairs.store import Store, table_metadata
from pairs.workspace import Dead, Workspace, alive
from training.config import Pin, folder_of
from training.order import WINDOW
from training.plan import BLOCK, DEALT, FEWEST, Block, Plan
from training.tokens import Tokeniser

COLUMNS = ["uid", "url_key", "status", "text", "texts", "width", "height", "image_offset", "image_size"]
NUMBERS = ("width", "height", "image_offset", "image_size")
VERSION = 2  # of the order that a plan gives; enters its fingerprint


def make_plan(
    store: Store, pins: Sequence[Pin], spec: PretrainSpec, apart: Collection[str] = (), dead: Dead | None = None
) -> tuple[Plan, dict[str, int]]:
    """The plan over the pinned shards without the uids `apart`, and the counts of rows left out: forgotten, canary,
    no_text, no_size. `dead` are the tombstones that hold; the workspace's where it is left out."""
    words, left_out = folder_of(store, spec.model.tokenizer), Counter[str]()
    tokeniser = Tokeniser(spec.model.context, words, spec.objective == "blip")
    columns: dict[str, list[int]] = {name: [] for name in ("image_offset", "image_size", "width", "height")}
    uids: list[str] = []
    texts: list[list[int]] = []
    blocks: list[Block] = []
    dead = Workspace(store).tombstones() if dead is None else dead
    for pin in pins:
        table = pinned_table(store, pin)
        kept = _usable(table, list(alive(table, dead).to_pylist()), frozenset(apart), left_out)
        blocks += _blocks(pin, kept, len(uids))
        for row in kept:
            uids.append(row["uid"])
            texts.append(list(dict.fromkeys(tokeniser.number(text) for text in row["choices"])))
            for name, values in columns.items():
                values.append(row[name])
    if len(uids) < max(2, spec.workers):
        raise PairmillError(
            expected=f"at least {max(2, spec.workers)} pairs to train on",
            found=f"{len(uids)} in {len(pins)} shards, left out: {dict(left_out) or 'none'}",
            remedy="loosen the rules of `keep`, or add sources",
        )
    tokens = tokeniser.tokens()
    if spec.objective != "blip" and tokens.used[-1] >= spec.model.vocabulary:  # a BLIP has its tokenizer's
        raise PairmillError(
            expected=f"pretrain.model.vocabulary above {tokens.used[-1]}, a token that texts hold (CLIP's has 49408)",
            found=str(spec.model.vocabulary),
            remedy="leave the setting out",
        )
    offsets, sizes, widths, heights = (np.array(values, dtype=np.int64) for values in columns.values())
    m, square = spec.model, spec.objective == "blip"
    identity = {
        "version": [VERSION, BLOCK, WINDOW, DEALT, FEWEST],
        "shards": [pin.model_dump() for pin in pins],
        "uids": fingerprint({"uids": uids}),
        "settings": [spec.batch_pairs, spec.max_patches, m.patch_px, m.context, spec.jitter, spec.seed],
        "extra": [m.kind, m.tokenizer, spec.patch_dropout],
    } | ({"weights": spec.weights} if spec.weights else {})
    plan = Plan(
        uids=uids,
        texts=texts,
        offsets=offsets,
        sizes=sizes,
        widths=widths,
        heights=heights,
        blocks=blocks,
        tokens=tokens,
        batch_pairs=spec.batch_pairs,
        max_patches=(m.image_px // m.patch_px) ** 2 if square else spec.max_patches,
        seed=spec.seed,
        fingerprint=fingerprint(identity),
        dropout=spec.patch_dropout,
        weights=spec.weights,
        square=square,
    )
    return plan, dict(left_out)


def pinned_path(store: Store, pin: Pin) -> str:
    """The table of a pinned shard, or what `compact` kept of it when it merged the shard into others."""
    kept = f"pinned/{pin.ref.table}"
    return kept if not store.has(pin.ref.table) and store.has(kept) else pin.ref.table


def pinned_table(store: Store, pin: Pin) -> pa.Table:
    """`COLUMNS` of the shard's table, which must belong to the pinned tar, and the tar must be whole."""
    again = "run the same command again: missing shards are made anew"
    merged = pinned_path(store, pin) != pin.ref.table  # the plan can be told, and no more
    for path in () if merged else (pin.ref.table, pin.ref.tar):
        if not store.has(path):
            raise PairmillError(expected=f"the shard {path}", found="no such file", remedy=again)
    table = store.read_table(pinned_path(store, pin))
    recorded = table_metadata(table)
    if recorded.get("tar_sha256") != pin.tar_sha256:
        raise PairmillError(
            expected=f"{pin.ref.table} to describe a tar of sha256 {pin.tar_sha256}",
            found=str(recorded.get("tar_sha256")),
            remedy="run the same command again: the shards were rewritten since this training was planned",
        )
    size = recorded.get("tar_size") if merged else store.size(pin.ref.tar)
    if recorded.get("tar_size") != str(size):
        raise PairmillError(
            expected=f"{recorded.get('tar_size')} bytes in {pin.ref.tar}",
            found=f"{size} bytes",
            remedy=f"delete {pin.ref.table} and {pin.ref.tar}, then run the same command again",
        )
    return _sound(table.select(COLUMNS), pin.ref.table, int(recorded["tar_size"]))


def _sound(table: pa.Table, path: str, tar_size: int) -> pa.Table:
    """The table with whole numbers where they belong, none of which points behind the tar's end."""
    for name in NUMBERS:
        try:
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(pa.int64()))
        except pa.ArrowException as error:  # a NaN, a word
            raise PairmillError(
                expected=f"whole numbers in the column {name} of {path}",
                found=" ".join(str(error).split()),
                remedy="run `pairmill verify` on the workspace, and mend what it names",
            ) from error
    end = pc.max(pc.add(table["image_offset"], table["image_size"])).as_py() or 0
    if end > tar_size:
        raise PairmillError(
            expected=f"images of {path} within its tar of {tar_size} bytes",
            found=f"one that ends at byte {end}",
            remedy="run `pairmill verify` on the workspace, and mend what it names",
        )
    return table


def _usable(table: pa.Table, living: list[bool], apart: frozenset[str], left_out: Counter[str]) -> list[dict[str, Any]]:
    """The rows that can be trained on, with `choices`, their texts."""
    kept = []
    for row, lives in zip(table.to_pylist(), living, strict=True):
        texts = [t["text"] for t in row["texts"] or [] if t["text"]]
        row["choices"] = texts or ([row["text"]] if row["text"] else [])
        whole = all(row[name] and row[name] > 0 for name in ("width", "height", "image_size", "image_offset"))
        checks = {"forgotten": lives, "canary": row["uid"] not in apart, "no_text": row["choices"], "no_size": whole}
        reason = next((name for name, fine in checks.items() if not fine), None)
        if reason:
            left_out[reason] += 1
        else:
            kept.append(row)
    return kept


def _blocks(pin: Pin, rows: list[dict[str, Any]], first: int) -> list[Block]:
    blocks = []
    for at in range(0, len(rows), BLOCK):
        part = rows[at : at + BLOCK]
        start = min(row["image_offset"] for row in part)
        end = max(row["image_offset"] + row["image_size"] for row in part)
        blocks.append(Block(pin.ref, first + at, len(part), start, end - start, pin.tar_sha256))
    return blocks
