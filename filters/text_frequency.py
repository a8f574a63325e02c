"""How common a pair's text is: its rank among the pairs with this text, and how many pairs, images and hosts have it.

A count grows with the corpus, but an answer mustn't change. So `rank` numbers the pairs with the same text in the order
increment, trusted first, uid: a rule `{column: text_frequency.rank, max: 19}` keeps twenty pairs of each text, however
many come later. Since uids are hashes these are twenty by chance, and this is MetaCLIP's balancing (at most t pairs an
entry in the mean, arXiv 2309.16671) with whole texts for entries. The other columns say what was known when the pair's
increment was reduced, its own pairs included. Texts are compared as `shingles.normal` leaves them.
Kept per pair: three 64-bit hashes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.base import Reducer
from filters.leaders import both, first_equal, scatter, turns
from filters.shingles import digest, normal


@dataclass(frozen=True)
class TextFrequency(Reducer):
    """`rank`: pairs with this text that come before, from 0. `count`, `images`, `hosts`: pairs, different original
    images and their hosts, with this text so far, from 1. Null where the text is blank."""

    text: str = "text"  # a column of texts: the pair's first, or filter.column

    columns = dict.fromkeys(("rank", "count", "images", "hosts"), pa.int64())  # type: ignore[assignment]
    takes = {"text": pa.string()}

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.text, "sha256", "url")

    def condense(self, table: pa.Table) -> pa.Table:
        texts, images, urls = (table[need].to_pylist() for need in self.needs)
        keys = {"text": [normal(text) for text in texts], "image": images, "host": [_host(url) for url in urls]}
        table = table.drop_columns(list(dict.fromkeys(self.needs)))
        for name, column in keys.items():
            table = table.append_column(f"hash.{name}", pa.array([digest(key) for key in column], pa.uint64()))
        return table

    def reduce(self, existing: pa.Table, new: pa.Table) -> pa.Table:
        turn = turns(existing, new)
        text, image, host = (_values(existing, new, name)[turn] for name in ("text", "image", "host"))
        known = np.flatnonzero(text != 0)
        asked = turn[known] >= existing.num_rows
        code = np.unique(text[known], return_inverse=True)[1]
        found = {"rank": _rank(code), "count": np.bincount(code)[code] if len(code) else code}
        found |= {"images": _different(code, image[known]), "hosts": _different(code, host[known])}
        columns = {name: pa.array(values[asked], pa.int64()) for name, values in found.items()}
        return scatter(new.num_rows, turn[known][asked] - existing.num_rows, columns)

    def query(self, corpus: pa.Table, queries: pa.Table, exclude: Sequence[str | None]) -> pa.Table:
        wanted = pc.unique(queries["hash.text"].drop_null())
        part = corpus.filter(pc.is_in(corpus["hash.text"], wanted)) if len(wanted) else corpus.slice(0, 0)
        found: list[dict[str, int]] = []
        holders: dict[int, list[tuple[Any, ...]]] = {}
        for text, *holder in _rows(part, "hash.text", "uid", "hash.image", "hash.host"):
            holders.setdefault(text, []).append(tuple(holder))
        for (text, image, host), without in zip(
            _rows(queries, "hash.text", "hash.image", "hash.host"), exclude, strict=True
        ):
            others = [holder for holder in holders.get(text, []) if holder[0] != without]
            counts = {"rank": len(others), "count": len(others) + 1}
            counts |= {"images": len({h[1] for h in others} | {image}), "hosts": len({h[2] for h in others} | {host})}
            found.append({} if text is None else counts)
        return pa.Table.from_pylist(found, schema=pa.schema(list(self.columns.items())))


def _rows(table: pa.Table, *names: str) -> list[tuple[Any, ...]]:
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def _host(url: str | None) -> str:
    try:
        return urlsplit(url or "").hostname or ""
    except ValueError:
        return ""


def _values(existing: pa.Table, new: pa.Table, name: str) -> np.ndarray:
    """Hashes of both tables, uint64, 0 where null."""
    return pc.fill_null(both(existing, new, f"hash.{name}"), pa.scalar(0, pa.uint64())).to_numpy()


def _rank(code: np.ndarray) -> np.ndarray:
    """How often each value stood before. `[7, 9, 7, 7]` gives `[0, 0, 1, 2]`."""
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    rank = np.empty(len(code), np.int64)
    rank[order] = np.arange(len(code)) - np.repeat(starts, np.diff(np.append(starts, len(code))))
    return rank


def _different(code: np.ndarray, value: np.ndarray) -> np.ndarray:
    """How many different values there are with each row's code."""
    if not len(code):
        return code
    words = np.stack([code.astype(np.uint64), value], axis=1)
    opens = first_equal(words) == np.arange(len(code))
    return np.bincount(code[opens])[code]
