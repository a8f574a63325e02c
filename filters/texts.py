"""Which texts a pair keeps: CapFilt's choice among the web's texts and the synthetic ones.

The lists named by `from` are joined in that order, and `match` holds one probability per text of the joined list.
A text survives at `min` or more; `keep` then takes all survivors, the first, the best, or the best of each kind (both).
A trusted pair survives with all of its own texts, and with none of another list: what people wrote for it is neither
judged nor diluted by what a captioner writes. All texts of a shard are handled as one flat array.
Li et al.: BLIP (2022), https://arxiv.org/abs/2201.12086
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from filters.columns import as_bool, list_lengths, one_chunk
from pairs.errors import PairmillError
from pairs.rules import TextsSpec
from pairs.schemas import KEPT_TEXT

SYNTHETIC = "synthetic"


def column_names(spec: TextsSpec) -> list[str]:
    """The columns that a choice of texts reads, by their full names: `texts` is the pair's own."""
    return [name if "." in name else f"pairs.{name}" for name in [*spec.sources, *([spec.match] if spec.match else [])]]


def choose_texts(spec: TextsSpec, table: pa.Table, trusted: np.ndarray) -> pa.Array:
    """For each row the list (of `KEPT_TEXT`) of the texts it keeps, in their order; empty where none survives.

    `table` holds `uid` and the columns of `column_names`; `trusted` is one bool per row.
    """
    names = column_names(spec)
    lists = [_as_lists(table[name], name) for name in names[: len(spec.sources)]]
    lengths = [list_lengths(part) for part in lists]
    count = np.sum(lengths, axis=0) if table.num_rows else np.zeros(0, np.int64)
    row_T = np.repeat(np.arange(table.num_rows), count)
    flat = _joined(lists, lengths, count)
    probability_T = _probabilities(table, names[-1], count) if spec.match else np.full(len(row_T), np.nan)
    survives_T = probability_T >= spec.min if spec.match else np.ones(len(row_T), bool)
    begin, own = np.cumsum(count) - count, lengths[0] if len(lengths) else count
    given_T = np.arange(len(row_T)) - begin[row_T] < own[row_T]
    vouched_T = (trusted & (own > 0))[row_T]
    own_T = vouched_T & given_T
    survives_T = np.where(vouched_T, own_T, survives_T)
    synthetic_T = as_bool(pc.equal(flat.field("kind"), SYNTHETIC))
    chosen_T = _pick(spec, row_T, survives_T, np.where(own_T, np.inf, probability_T), synthetic_T)
    kept = np.flatnonzero(chosen_T)
    probabilities = pa.array(probability_T, pa.float32(), from_pandas=True)
    texts = pa.StructArray.from_arrays([*flat.flatten(), probabilities], fields=list(KEPT_TEXT)).take(pa.array(kept))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row_T[kept], minlength=table.num_rows))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts)


def _pick(
    spec: TextsSpec, row_T: np.ndarray, survives_T: np.ndarray, rank_T: np.ndarray, synthetic_T: np.ndarray
) -> np.ndarray:
    """Which survivors stay: all, the first of each row, or the highest of each row (best) or of each row and kind
    (both); ties: the first."""
    if spec.keep == "all":
        return survives_T
    rank_T = np.zeros(len(row_T)) if spec.keep == "first" else rank_T
    place = np.flatnonzero(survives_T)
    group = row_T[place] * 2 + (synthetic_T[place] if spec.keep == "both" else 0)
    order = np.lexsort((place, -np.nan_to_num(rank_T[place], nan=0.0), group))
    first = np.append(True, np.diff(group[order]) != 0)[: len(order)]
    chosen = np.zeros(len(row_T), bool)
    chosen[place[order[first]]] = True
    return chosen


def _as_lists(column: pa.ChunkedArray, name: str) -> pa.Array:
    """A list column of texts as lists of (text, kind, language); plain strings are synthetic ones."""
    flat = one_chunk(column)
    if not pa.types.is_list(flat.type):
        raise PairmillError(
            expected=f"lists of texts in {name}, which `texts.from` names",
            found=f"values of type {flat.type}",
            remedy="name list columns there, such as texts or blip_caption.texts",
        )
    if pa.types.is_struct(flat.type.value_type):
        return flat
    inner = flat.flatten()
    kind = pa.array([SYNTHETIC], pa.string()).take(pa.array(np.zeros(len(inner), np.int64)))
    unknown = pa.nulls(len(inner), pa.string())
    texts = pa.StructArray.from_arrays([inner, kind, unknown], names=["text", "kind", "language"])
    offsets = np.concatenate([[0], np.cumsum(list_lengths(flat))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), texts)


def _joined(lists: list[pa.Array], lengths: list[np.ndarray], count: np.ndarray) -> pa.StructArray:
    """The texts of all rows, row after row, each row's lists in their order."""
    begin = np.cumsum(count) - count
    place = []
    for number in lengths:  # of each list's flat texts the place among all texts
        place.append(np.repeat(begin - (np.cumsum(number) - number), number) + np.arange(number.sum()))
        begin = begin + number
    parts = [part.flatten().cast(pa.struct(list(KEPT_TEXT)[:3])) for part in lists]
    return pa.concat_arrays(parts).take(pa.array(np.argsort(np.concatenate(place), kind="stable")))


def _probabilities(table: pa.Table, name: str, count: np.ndarray) -> np.ndarray:
    """One float per text, NaN where the row wasn't matched."""
    lists = one_chunk(table[name])
    lengths = list_lengths(lists)
    wrong = np.flatnonzero((lengths != count) & as_bool(pc.is_valid(lists)))
    if len(wrong):
        uid = table["uid"][int(wrong[0])]
        raise AssertionError(f"{name} has {lengths[wrong[0]]} values for {count[wrong[0]]} texts of pair {uid}")
    found = np.full(int(count.sum()), np.nan)
    found[np.repeat(lengths > 0, count)] = lists.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
    return found
