"""Uid lists are DataComp's: what we write its reader finds by binary search, what it writes we look up."""

import bisect
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairs import uid_lists
from pairs.errors import PairmillError
from pairs.uid_lists import among, load_uid_list, save_uid_list

UIDS = [f"{n * 0x9E3779B97F4A7C15F39CC0605CEDC834 % 2**128:032x}" for n in range(1, 200)]


def column(uids: list[str | None]) -> pa.ChunkedArray:
    return pa.chunked_array(
        [pa.array(uids[: len(uids) // 2], pa.string()), pa.array(uids[len(uids) // 2 :], pa.string())]
    )


def in_their_way(path: Path, uid: str) -> bool:
    """As DataComp's tools do: the array is mapped, a uid is its two halves, and bisection finds it."""
    array = np.load(path, mmap_mode="r")
    assert array.dtype == np.dtype("u8,u8")
    pair = (int(uid[:16], 16), int(uid[16:], 16))
    place = bisect.bisect_left(array, pair, key=lambda row: (int(row[0]), int(row[1])))
    return place < len(array) and tuple(map(int, array[place])) == pair


def test_their_reader_finds_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "list.npy"
    assert save_uid_list(path, [column([*UIDS[:50], UIDS[7]]), column(UIDS[40:100])]) == 100
    assert [in_their_way(path, uid) for uid in UIDS] == [n < 100 for n in range(len(UIDS))]


def test_we_find_what_they_write(tmp_path: Path) -> None:
    path = tmp_path / "theirs.npy"
    theirs = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in UIDS[:100]], np.dtype("u8,u8"))
    theirs.sort()
    np.save(path, theirs)
    asked = [UIDS[150], None, UIDS[3], "not a uid", UIDS[99].upper(), UIDS[100]]
    assert among(column(asked), path).tolist() == [False, False, True, False, True, False]
    ours = tmp_path / "ours.npy"
    save_uid_list(ours, [column(list(UIDS[:100]))])
    assert ours.read_bytes() == path.read_bytes()


near = st.tuples(st.integers(0, 3), st.integers(0, 3))  # upper halves that many uids share


@given(st.lists(near, max_size=30), st.lists(near, max_size=12))
def test_shared_halves_and_block_borders_lose_nothing(
    listed: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    path = Path(f"/tmp/uids-{np.random.default_rng().integers(2**60)}.npy")
    whole, uid_lists.BLOCK = uid_lists.BLOCK, 4
    try:
        save_uid_list(path, [pa.chunked_array([[f"{a:016x}{b:016x}" for a, b in listed]], pa.string())])
        found = among(pa.array([f"{a:016x}{b:016x}" for a, b in asked], pa.string()), path)
    finally:
        uid_lists.BLOCK = whole
        path.unlink()
    assert found.tolist() == [pair in listed for pair in asked]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with pytest.raises(PairmillError, match="uid list"):
        load_uid_list(path)
    for array in (np.arange(3), np.zeros((2, 2), "u8,u8"), np.array([{}], object)):
        np.save(path, array)
        with pytest.raises(PairmillError, match="uid list"):
            load_uid_list(path)
    np.save(path, np.array([(2, 0), (1, 0)], "u8,u8"))
    with pytest.raises(PairmillError, match="sorted"):
        among(pa.array([UIDS[0]]), path)
