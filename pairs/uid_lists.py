"""DataComp's uid lists: a subset of a corpus as one `.npy` file of sorted pairs of unsigned 64-bit numbers (`u8,u8`),
the two halves of each 128-bit uid. A list that we write is read by DataComp's own tools, and the other way round.

A list is memory-mapped and asked block by block by binary search, so one of a billion uids costs 16 MB of memory.
Gadre et al.: DataComp (2023), https://arxiv.org/abs/2304.14108
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairs.errors import PairmillError
from pairs.identity import ID_LENGTH

UID = np.dtype("u8,u8")
BLOCK = 1 << 20  # uids that are in memory at a time


def halves(uids: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The upper and lower 64 bits of each uid in hex, and whether it is one (32 hex digits); 0 where it isn't."""
    chunks = uids.chunks if isinstance(uids, pa.ChunkedArray) else [uids]
    parts = [np.zeros((0, 2), np.uint64)]
    known = [np.zeros(0, bool)]
    for chunk in chunks:
        text = chunk.cast(pa.string())
        right = pc.fill_null(pc.match_substring_regex(text, f"^[0-9a-fA-F]{{{ID_LENGTH}}}$"), False)
        whole = pc.if_else(right, text, "0" * ID_LENGTH)
        data = bytes.fromhex("".join(whole.to_pylist()))
        parts.append(np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, 2))
        known.append(right.to_numpy(zero_copy_only=False))
    both = np.concatenate(parts)
    return both[:, 0], both[:, 1], np.concatenate(known)


def save_uid_list(path: Path, columns: Iterable[pa.ChunkedArray]) -> int:
    """Writes the uids of all `columns`, sorted, each once; returns how many. All of them must be 128 bits in hex."""
    found = [np.zeros(0, UID)]
    for column in columns:
        high, low, known = halves(column)
        assert known.all(), "uids that are none"
        part = np.empty(len(high), UID)
        part["f0"], part["f1"] = high, low
        found.append(part)
    uids = np.concatenate(found)
    order = np.lexsort((uids["f1"], uids["f0"]))
    uids = uids[order]
    first = np.ones(len(uids), bool)
    first[1:] = uids[1:] != uids[:-1]
    with path.open("wb") as file:
        np.save(file, uids[first], allow_pickle=False)
    return int(first.sum())


def load_uid_list(path: Path) -> np.ndarray:
    """The list in a file, memory-mapped: sorted, of type `u8,u8`."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        told = str(error)
    else:
        if found.dtype == UID and found.ndim == 1:
            return np.asarray(found)
        told = f"an array of type {found.dtype} and shape {found.shape}"
    raise PairmillError(
        expected=f"a DataComp uid list at {path}: one .npy array of type u8,u8",
        found=told,
        remedy="correct the path, or write the list with `pairmill export-uids`",
    )


def among(uids: pa.Array | pa.ChunkedArray, path: Path) -> np.ndarray:
    """For each uid whether it is in the list at `path`; what isn't a uid is in none."""
    listed = load_uid_list(path)
    high, low, known = halves(uids)
    order = np.lexsort((low, high))
    high, low = high[order], low[order]
    inside, before = np.zeros(len(order), bool), np.uint64(0)
    for start in range(0, len(listed), BLOCK):
        block = listed[start : start + BLOCK]
        block_high, block_low = np.ascontiguousarray(block["f0"]), np.ascontiguousarray(block["f1"])
        if block_high[0] < before or np.any(block_high[1:] < block_high[:-1]):
            raise PairmillError(expected=f"sorted uids in {path}", found="others", remedy="sort the array and save it")
        before = block_high[-1]
        rows = slice(np.searchsorted(high, block_high[0], "left"), np.searchsorted(high, before, "right"))
        inside[rows] |= _found(high[rows], low[rows], block_high, block_low)
    answers = np.zeros(len(order), bool)
    answers[order] = inside
    return answers & known


def _found(high: np.ndarray, low: np.ndarray, block_high: np.ndarray, block_low: np.ndarray) -> np.ndarray:
    """Whether each (high, low) is in the block. Upper halves that several uids share are walked one by one."""
    place, end = np.searchsorted(block_high, high, "left"), np.searchsorted(block_high, high, "right")
    inside = np.zeros(len(high), bool)
    for step in range(int((end - place).max(initial=0))):
        here = place + step < end
        inside[here] |= block_low[place[here] + step] == low[here]
    return inside
