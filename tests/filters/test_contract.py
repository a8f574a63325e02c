"""The mechanics of every filter module there is, found by itself: a new filter is covered without being told.

Each filter's own test states what its numbers mean; this one states that the numbers can be trusted to belong to the
pair, the column and the fingerprint that they are filed under.
"""

import functools
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from filters.base import PIXELS, Filter, fingerprint_of
from filters.engine import score_shards
from filters.lookup import load_filter, names
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import Store
from tests.filters.scoring import fresh_folder, planned, scores, small
from tests.filters.shards import TEXTS, pair, write_shards
from tests.filters.weights import WEIGHTS

GOLDEN = Path(__file__).parent / "golden"
NO_IMAGE, FORGOTTEN, NO_TEXT = 2, 3, 4  # rows of `write_shards`

every_filter = pytest.mark.parametrize("name", names(Filter))


@functools.cache
def store_and_shards() -> tuple[Store, list[ShardRef]]:
    store = Store(fresh_folder())
    return store, write_shards(store)


@every_filter
def test_tables_have_the_declared_columns_in_the_order_of_the_pairs(name: str) -> None:
    store, refs = store_and_shards()
    declared = pa.schema([("uid", pa.string()), *small(name).columns.items()])
    for ref, table in zip(refs, scores(name, store, refs), strict=True):
        assert table.schema.remove_metadata().equals(_as_read(declared))
        assert table["uid"].to_pylist() == store.read_table(ref.table)["uid"].to_pylist()


@every_filter
def test_every_column_measures_something(name: str) -> None:
    table = scores(name, *store_and_shards())[0]
    assert not [column for column in table.column_names if table[column].null_count == table.num_rows]


@every_filter
def test_a_value_depends_on_its_pair_alone(name: str) -> None:
    together = [row for table in scores(name, *store_and_shards()) for row in table.to_pylist()]
    store = Store(fresh_folder())
    refs = [ShardRef("pairs/web-0123456789ab/0001", i) for i in range(8)]
    for i, ref in enumerate(reversed(refs)):  # the first shard's pairs, each alone in a shard, in reverse
        row, data = pair(i, text=TEXTS[i % len(TEXTS)], image=b"no image" if i == NO_IMAGE else None)
        write_shard(store, ref, [(row | {"status": "forgotten" if i == FORGOTTEN else "ok"}, data)], PAIRS)
    alone = [table.to_pylist()[0] for table in scores(name, store, refs)][::-1]
    tolerance = {"": 0.0, "fp32": 1e-5, "bf16": 2e-2}[small(name).dtype]
    for row, expected in zip(alone, together[:8], strict=True):
        assert_close(row, expected, tolerance, half=tolerance and 2e-3, where=row["uid"])


@every_filter
def test_what_cannot_be_measured_is_null(name: str) -> None:
    rows = scores(name, *store_and_shards())[0].select(list(small(name).columns)).to_pylist()
    assert set(rows[FORGOTTEN].values()) == {None}
    if PIXELS in small(name).needs:
        assert any(map(is_nothing, rows[NO_IMAGE].values()))
    if "text" in small(name).needs:
        assert any(map(is_nothing, rows[NO_TEXT].values()))


def is_nothing(value: Any) -> bool:
    """Null, or a list that is aligned with the texts and all null."""
    return value is None or (isinstance(value, list) and len(value) > 0 and set(value) == {None})


@every_filter
def test_a_second_run_is_free(name: str) -> None:
    store, refs = store_and_shards()
    scores(name, store, refs)
    assert score_shards(store, planned(name)[0], refs, engine="inline", workers=1).shards == 0


@every_filter
def test_a_filter_pickles_and_keeps_its_fingerprint(name: str) -> None:
    again = pickle.loads(pickle.dumps(small(name)))
    assert again == small(name)
    assert fingerprint_of(name, again, {}) == fingerprint_of(name, small(name), {})


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_equal_weights_in_another_folder_have_the_same_fingerprint(name: str) -> None:
    moved = load_filter(name, WEIGHTS[name](fresh_folder()))
    assert moved != small(name)
    assert fingerprint_of(name, moved, {}) == fingerprint_of(name, small(name), {})


@every_filter
def test_the_fingerprint_gives_the_golden_scores(name: str) -> None:
    """`WRITE_GOLDEN=1 pytest tests/filters/test_contract.py` writes them, for a new filter or a raised version."""
    _, one = planned(name)
    found = {"fingerprint": one.fingerprint, "rows": scores(name, *store_and_shards())[0].to_pylist()}
    path = GOLDEN / f"{name}.json"
    if os.environ.get("WRITE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1, default=float) + "\n")
    assert path.exists(), f"no golden scores of {name}: run this test once with WRITE_GOLDEN=1"
    golden = json.loads(path.read_text())
    assert golden["fingerprint"] == found["fingerprint"], "settings, version or weights changed: write it anew"
    for row, expected in zip(found["rows"], golden["rows"], strict=True):
        assert_close(row, expected, 2e-3 if one.filter.dtype else 1e-5, half=2e-3, where=f"{name} {row['uid']}")


def assert_close(found: Any, expected: Any, tolerance: float, half: float, where: str) -> None:
    """Equal in shape, strings and nulls; numbers within `tolerance`, those in lists (fp16 embeddings) within `half`."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_close(found[key], expected[key], tolerance, half, f"{where} {key}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), where
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, half, half, where)
    elif isinstance(expected, float) and isinstance(found, float):
        assert math.isclose(float(found), expected, rel_tol=tolerance, abs_tol=tolerance), (
            f"{where}: {found} {expected}"
        )
    else:
        assert found == expected, f"{where}: {found!r}, not {expected!r}"


def _as_read(schema: pa.Schema) -> pa.Schema:
    """The schema as Parquet gives it back (it renames the fields of lists)."""
    store = Store(fresh_folder())
    store.write_table("empty.parquet", schema.empty_table())
    return store.read_table("empty.parquet").schema.remove_metadata()
