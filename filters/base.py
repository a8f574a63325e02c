"""What a filter and a reducer are: measurements of pairs that declare what they need and which columns they make.

Neither decides anything: thresholds belong to the selection. A filter is row-local: a pair's values depend on
that pair alone (never on its batch-mates, the worker or the order), so tables can be made shard by shard, anywhere.
A reducer sees the columns of all shards. Both are frozen dataclasses whose fields are their settings; they stay
small and picklable, so a loaded model lives in a per-process cache of its module (`functools.cache` keyed by
path and content hash), never in a field.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pyarrow as pa

from filters.parts import Part, Work, nothing
from pairs.fingerprint import fingerprint
from pairs.schemas import PAIRS

PIXELS = "pixels"
CORPUS = ("uid", "source", "increment", "trusted")  # what every reducer gets besides what it needs

Values: TypeAlias = Sequence[Any] | np.ndarray | pa.Array


@dataclass(frozen=True)
class Batch:
    """Some pairs of one shard, in the shard's order.

    `columns` holds what the filter needs by name, one value per pair: `text` is str or None, `texts` a list of dicts
    (text, kind, language), `filter.column` that filter's value (a vector of fp16 as a numpy array). `pixels` are HxWx3
    uint8 RGB arrays, None where an image doesn't decode. Forgotten pairs never reach a filter.
    """

    uids: list[str]
    columns: Mapping[str, list[Any]]
    pixels: list[np.ndarray | None] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.uids)

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    def take(self, rows: Sequence[int]) -> "Batch":
        """The pairs at `rows`."""
        columns = {name: [values[i] for i in rows] for name, values in self.columns.items()}
        return Batch([self.uids[i] for i in rows], columns, [self.pixels[i] for i in rows] if self.pixels else [])


class Measurement:
    """What filters and reducers share. A subclass sets `needs` and `columns` as plain class attributes, or as
    properties where they depend on its settings."""

    version: ClassVar[int] = 1  # raise it when the same input would give another output

    @property
    def needs(self) -> tuple[str, ...]:
        """Fields of `pairs.schemas.PAIRS`, "pixels" (filters only), or "filter.column"."""
        raise NotImplementedError

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        """The columns made, by name, with their Arrow types. Any of them may hold nulls."""
        raise NotImplementedError

    def content_hashes(self) -> dict[str, str]:
        """Hashes of the content of what is loaded (weights, lists), by setting name; they enter the fingerprint in
        those settings' place, so that a name or a path never does."""
        return {}

    def check(self) -> None:
        """Raises PairmillError where what is loaded isn't there or isn't what it should be, before anything runs; what
        only a network could tell is left untold."""
        self.content_hashes()


class Filter(Measurement):
    """A row-local measurement: pairs, or other filters' columns, to score columns."""

    @property
    def batch_size(self) -> int:
        """Pairs per call of `score`, at most; a batch never crosses a shard."""
        return 256

    @property
    def dtype(self) -> str:
        """The precision that the model computes in; empty where there is none."""
        return ""

    @property
    def gpu(self) -> float:
        """The share of a GPU, in (0, 1], that one worker needs where there are GPUs; 0 for what the CPU does."""
        return 0.0

    def score(self, batch: Batch) -> Mapping[str, Values]:
        """One value per pair and column; None (or NaN) for what can't be measured."""
        raise NotImplementedError


class Reducer(Measurement):
    """A corpus-wide measurement. It gives groups and counts, not verdicts.

    Its tables hold `CORPUS` and what is needed, and of earlier rows this reducer's own columns; all of it condensed. Of
    earlier rows those are given that lead a group (string columns name groups), and members of groups whose leader is
    forgotten, which stand for it under the group's name; or all where it makes no groups.
    A reducer whose condensed rows are too large for one process answers part by part: it overrides the last two.
    `takes`: settings that name a column, with the type that it must have (floats of any width are alike).
    """

    takes: ClassVar[Mapping[str, pa.DataType]] = {}

    def condense(self, table: pa.Table) -> pa.Table:
        """The rows of one shard in the form that the others take, small enough to stand beside those of all shards."""
        return table

    def reduce(self, existing: pa.Table, new: pa.Table) -> pa.Table:
        """The columns of the `new` rows, in their order.

        Rows of `existing` have had their answer: nothing that `new` brings changes it.
        """
        raise NotImplementedError

    def query(self, corpus: pa.Table, queries: pa.Table, exclude: Sequence[str | None]) -> pa.Table:
        """What the columns of the `queries` would be, each asked alone against `corpus` (which has this reducer's
        columns) without the row whose uid is at the query's place in `exclude`. Changes nothing; for canaries."""
        raise NotImplementedError

    def reduce_parts(self, existing: Sequence[Part], new: Sequence[Part], work: Work) -> pa.Table:
        """`reduce` of parts, one part's rows below the other's."""
        asking = work.table(self, new)
        before = work.table(self, existing) if existing else nothing(self, asking, own=True)
        return self.reduce(before, asking)

    def query_parts(
        self, corpus: Sequence[Part], queries: Sequence[Part], exclude: Sequence[str | None], work: Work
    ) -> pa.Table:
        """`query` of parts."""
        asking = work.table(self, queries)
        before = work.table(self, corpus) if corpus else nothing(self, asking, own=True)
        return self.query(before, asking, exclude)


def class_name(name: str) -> str:
    """`text_stats` → `TextStats`."""
    return "".join(part.capitalize() for part in name.split("_"))


def settings_of(measurement: Measurement) -> dict[str, Any]:
    """The fields of a filter or reducer, by name."""
    if not dataclasses.is_dataclass(measurement):
        return {}
    return {field.name: getattr(measurement, field.name) for field in dataclasses.fields(measurement)}


def fingerprint_of(name: str, measurement: Measurement, needed: Mapping[str, str]) -> str:
    """12 hex digits that change with whatever may change the values.

    `needed` holds the fingerprints of the filters (or reducers) whose columns are read, by their names. Settings
    that name content are left out: its hash stands for them.
    """
    contents = measurement.content_hashes()
    parts: dict[str, object] = {
        "name": name,
        "version": measurement.version,
        "settings": {key: value for key, value in settings_of(measurement).items() if key not in contents},
        "contents": contents,
        "needed": dict(needed),
    }
    if type(measurement).__name__ != class_name(name):  # a recipe's own name for it
        parts["kind"] = type(measurement).__name__
    if isinstance(measurement, Filter):
        parts |= {"batch_size": measurement.batch_size, "dtype": measurement.dtype}
    return fingerprint(parts)


def needed_filters(measurement: Measurement) -> list[str]:
    """Names of the filters whose columns are needed: `clip` for "clip.cosine"; sorted, each once."""
    return sorted({need.partition(".")[0] for need in measurement.needs if "." in need})


def pair_fields(measurement: Measurement) -> list[str]:
    """The needed columns of the pair table. Whatever is neither that, pixels nor "filter.column" is a bug of the
    filter's author."""
    fields = [need for need in measurement.needs if "." not in need and need != PIXELS]
    unknown = [field for field in fields if field not in PAIRS.names]
    assert not unknown, f"{type(measurement).__name__} needs {unknown[0]!r}, which no pair table has"
    return fields
