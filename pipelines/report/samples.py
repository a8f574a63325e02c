"""Samples for a report: which pairs are shown for a rule, and their thumbnails as data in the page.

Chosen by hash of the uid; forgotten pairs are never shown. A thumbnail costs one range request. What a rule with
`quarantine: true` would drop has none, whichever rule it is shown for.
"""

import base64
from collections import Counter
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from filters.canary_figures import wilson
from filters.columns import Frame
from pairs.identity import unit_hash
from pairs.rules import Rule, TextsSpec
from pairs.store import Store

Facts = dict[str, Any]
SHOWN = 8
CAPTIONS = 24
THUMB_PX = 118
TEXT_CHARS = 120


class Sampler:
    """Looks up pairs of a frame; `tables` are the selection's by the rules `keep`, shard by shard."""

    def __init__(self, store: Store, frame: Frame, tables: Sequence[pa.Table], keep: Sequence[Rule]) -> None:
        self.store, self.frame = store, frame
        selection = pa.concat_tables(tables)
        self.uids = frame.table["uid"].to_pylist()
        self.kept = np.array(selection["kept"].to_pylist(), bool)
        self.first = selection["dropped_by"].to_pylist()
        self.texts = selection["texts"].to_pylist()
        self.withheld = _withheld(selection["would_drop"].to_pylist(), keep)
        self._places: dict[int, Facts] = {}

    def of_rule(self, name: str, values: np.ndarray | None, limit: float | None) -> Facts:
        """Samples of what the rule was the first to drop, of what was kept, and of what is nearest to its limit."""
        dropped = [row for row, first in enumerate(self.first) if first == name]
        kept = [row for row in np.flatnonzero(self.kept & ~self.frame.trusted)]
        near: list[int] = []
        if values is not None and limit is not None:
            distance = np.where(self.frame.alive & ~self.frame.trusted, np.abs(values - limit), np.nan)
            near = [int(row) for row in np.argsort(distance, kind="stable")[:SHOWN] if np.isfinite(distance[row])]
        groups = {"dropped": self._chosen(dropped), "kept": self._chosen(kept), "nearest": near}
        return {key: [self._card(row, values) for row in rows] for key, rows in groups.items()}

    def _chosen(self, rows: Sequence[Any], count: int = SHOWN) -> list[int]:
        living = [int(row) for row in rows if self.frame.alive[row]]
        return sorted(living, key=lambda row: unit_hash("report", self.uids[row]))[:count]

    def _card(self, row: int, values: np.ndarray | None) -> Facts:
        value = None if values is None or not np.isfinite(values[row]) else round(float(values[row]), 4)
        text = (self.frame.table["pairs.text"][row].as_py() or "")[:TEXT_CHARS]
        return {"uid": self.uids[row], "image": self.thumbnail(row), "text": text, "value": value}

    def thumbnail(self, row: int) -> str | None:
        """The pair's image as a data URI, or None where it is quarantined or doesn't decode."""
        if self.withheld[row]:
            return None
        place = int(np.searchsorted(self.frame.starts, row, "right")) - 1
        ref = self.frame.shards[place][1]
        if place not in self._places:
            table = self.store.read_table(ref.table, ["image_offset", "image_size"])
            self._places[place] = {name: table[name].to_pylist() for name in table.column_names}
        at = row - int(self.frame.starts[place])
        offset, size = self._places[place]["image_offset"][at], self._places[place]["image_size"][at]
        if offset is None:
            return None
        pixels = cv2.imdecode(np.frombuffer(self.store.read(ref.tar, offset, size), np.uint8), cv2.IMREAD_COLOR)
        if pixels is None:
            return None
        scale = min(1.0, THUMB_PX / max(pixels.shape[:2]))
        small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        return "data:image/jpeg;base64," + base64.b64encode(data).decode()

    def captions(self, spec: TextsSpec) -> Facts:
        """Web and synthetic texts side by side, with what became of each; nothing where no captions were made."""
        if spec.match is None:
            return {"captions": [], "caption_counts": None, "noise_ratios": None}
        makers = [
            (name, self.frame.table[name if "." in name else f"pairs.{name}"].to_pylist()) for name in spec.sources
        ]
        scores = self.frame.table[spec.match].to_pylist()
        counts: Counter[str] = Counter()
        entries: dict[int, list[Facts]] = {}
        for row in np.flatnonzero(self.frame.alive & ~self.frame.trusted):
            texts = [_text(entry) for _, column in makers for entry in column[row] or []]
            probabilities = scores[row] or [None] * len(texts)
            entries[int(row)] = [
                {"text": text, "kind": kind, "probability": p, "kept": p is not None and p >= spec.min}
                for (text, kind), p in zip(texts, probabilities, strict=True)
            ]
            for entry in entries[int(row)]:
                side = "synthetic" if entry["kind"] == "synthetic" else "web"
                counts.update([side, *[f"{side}_kept"] * entry["kept"]])
                counts[f"{side}_unmatched"] += entry["probability"] is None
        shown = self._chosen(list(entries), CAPTIONS)
        cards = [
            {"uid": self.uids[row], "image": self.thumbnail(row), "texts": [_short(e) for e in entries[row]]}
            for row in shown
        ]
        return {
            "captions": [card for card in cards if card["image"]],
            "caption_counts": {key: counts[key] for key in ("web", "web_kept", "synthetic", "synthetic_kept")},
            "noise_ratios": {side: _noise(counts, side) for side in ("web", "synthetic")},
        }


def _noise(counts: Counter[str], side: str) -> Facts:
    """The share of the matched texts that the match dropped."""
    matched = counts[side] - counts[f"{side}_unmatched"]
    return wilson(matched - counts[f"{side}_kept"], matched)


def _withheld(would_drop: Sequence[Sequence[str] | None], keep: Sequence[Rule]) -> np.ndarray:
    """Where one of the rules with `quarantine` would drop the pair."""
    names = {rule.name for rule in keep if rule.quarantine}
    return np.array([not names.isdisjoint(rules or ()) for rules in would_drop], bool)


def _text(entry: Any) -> tuple[str, str]:
    """Text and kind of an entry of a texts column: a struct, or the plain string that a captioner makes."""
    return (entry["text"], entry["kind"]) if isinstance(entry, dict) else (entry, "synthetic")


def _short(entry: Facts) -> Facts:
    return entry | {"text": (entry["text"] or "")[:TEXT_CHARS]}
