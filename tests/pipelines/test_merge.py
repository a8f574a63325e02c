"""The merge gives what a plain one in memory gives, byte for byte, however it is spilled and on whatever it runs."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairs.identity import url_key
from pairs.schemas import CANDIDATES
from pairs.store import Store
from pipelines import merge as module
from pipelines.candidates import _judge
from pipelines.merge import Merge, Outcome, Sets, clean, merge, merge_rows, write_groups
from pipelines.sources import Row, text

URLS = [f"http://a.test/{n}.png" for n in range(12)]
KEYS = [url_key(url) for url in URLS]
KEY_SETS = st.sets(st.sampled_from(KEYS))
WORDS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(("alt", "title"))), max_size=3)
ROWS = st.fixed_dictionaries(
    {
        "url": st.sampled_from(URLS),
        "page": st.sampled_from((None, "http://p.test/1", "http://p.test/2")),
        "position": st.integers(0, 3),
        "texts": WORDS.map(lambda words: [text(*word) for word in words]),
        "opt_out": st.sampled_from((None, None, "noai")),
        "license": st.sampled_from((None, "cc0")),
        "found": st.sampled_from(("img", "og")),
    }
)


def cleaned(rows: list[Row]) -> list[Row]:
    return [kept for row in rows if (kept := clean(row, Outcome().dropped))]


def plain(rows: list[Row], earlier: list[Sets], dead: set[str]) -> tuple[pa.Table, dict[str, Any]]:
    """The oracle: all at once, in memory."""
    merged = merge_rows(rows)
    kept, dropped, late = _judge(merged, earlier, frozenset(dead))
    dropped["merged"] = len(rows) - len(merged)
    opted = sum(row["opt_out"] is not None for row in kept)
    table = pa.Table.from_pylist(sorted(kept, key=lambda row: row["url_key"]), schema=CANDIDATES)
    return table, {"taken": len(rows), "kept": len(kept), "opted": opted, "dropped": dropped, "late": late}


def merged_bytes(rows: list[Row], earlier: list[Sets], dead: set[str], **how: Any) -> tuple[bytes, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        found = merge(iter(rows), iter(earlier), dead, Merge(store, "spilled", _judge, **how))
        write_groups(store, "out.parquet", found.tables(), {"a": "b"})
        return store.read("out.parquet"), vars(found.outcome)


def few_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(module, "PARTS", 16)
    patch.setattr(module, "STARTS", [f"{number:01x}" for number in range(16)])
    patch.setattr(module, "first", lambda key: int(key[0], 16))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(ROWS, max_size=40), st.lists(st.tuples(KEY_SETS, KEY_SETS, KEY_SETS, KEY_SETS), max_size=3), KEY_SETS,
    st.sampled_from((1, 7, 1000)), st.sampled_from((1, 3, 1000)),
)  # fmt: skip
def test_equal_to_a_merge_in_memory(
    rows: list[Row], earlier: list[Sets], dead: set[str], run_rows: int, group_rows: int
) -> None:
    table, counts = plain(cleaned(rows), earlier, dead)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "RUN_ROWS", run_rows)
        few_parts(patch)
        patch.setattr(module, "GROUP_ROWS", group_rows)
        data, outcome = merged_bytes(cleaned(rows), earlier, dead)
        with tempfile.TemporaryDirectory() as folder:
            groups = [table[start : start + group_rows] for start in range(0, table.num_rows, group_rows)]
            write_groups(Store(folder), "out.parquet", iter(groups), {"a": "b"})
            expected = Store(folder).read("out.parquet")
    assert outcome == counts
    spilled = len(rows) >= run_rows
    assert data == expected or (not spilled and pq.read_table(pa.BufferReader(data)).equals(table))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_equal_on_ray_and_to_the_table_of_a_single_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = ({"url": f"http://a.test/{n % 600}.png", "page": f"http://p.test/{n}"} for n in range(1000))
    rows = cleaned([row | {"position": n, "texts": [text(f"t {n}", "alt")]} for n, row in enumerate(made)])
    table, _ = plain(rows, [({KEYS[0]}, set(), {KEYS[0]}, set())], set())
    Store(tmp_path).write_table("plain.parquet", table, {"a": "b"})
    whole = merged_bytes(rows, [({KEYS[0]}, set(), {KEYS[0]}, set())], set())
    assert whole[0] == Store(tmp_path).read("plain.parquet") and whole[1]["kept"] == 599
    monkeypatch.setattr(module, "RUN_ROWS", 300)
    spill = functools.partial(merged_bytes, rows, [({KEYS[0]}, set(), {KEYS[0]}, set())], set())
    assert spill() == whole
    few_parts(monkeypatch)
    assert spill() == spill(engine="ray", workers=2) == whole


def test_many_groups_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RUN_ROWS", 10)
    monkeypatch.setattr(module, "GROUP_ROWS", 8)
    rows = cleaned([{"url": f"http://a.test/{n}.png", "page": None, "position": 0, "texts": []} for n in range(35)])
    data, _ = merged_bytes(rows, [], set())
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [8, 8, 8, 8, 3]
        assert file.read()["url_key"].to_pylist() == sorted(row["url_key"] for row in rows)
