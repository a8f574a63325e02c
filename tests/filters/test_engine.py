"""The engine on filters made for the purpose: order, needs, isolation of bad pairs, tombstones, equal bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.session import ray_session
from filters import engine as engine_module
from filters import images
from filters.base import Batch, Filter, fingerprint_of
from filters.engine import missing, plan, score_shards
from filters.lookup import load_filter, names
from pairs.errors import PairmillError
from pairs.shard import ShardRef
from pairs.store import Store
from tests.filters.scoring import small
from tests.filters.shards import write_shards


@dataclass(frozen=True)
class Length(Filter):
    """Length of the text; every text of `bad` characters raises."""

    bad: int = -1
    size: int = 3
    needs = ("text",)
    columns = {"n": pa.int32()}

    @property
    def batch_size(self) -> int:
        return self.size

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        assert len(batch) <= self.size
        lengths = [None if text is None else len(text) for text in batch["text"]]
        if self.bad in lengths:
            raise ValueError("this text can't be read")
        return {"n": lengths}


@dataclass(frozen=True)
class Twice(Filter):
    """Twice the length, from `length.n`."""

    needs = ("length.n",)
    columns = {"n": pa.int32()}

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        return {"n": [None if n is None else 2 * n for n in batch["length.n"]]}


@dataclass(frozen=True)
class Sides(Filter):
    """Height of the decoded image."""

    size: int = 4
    needs = ("pixels",)
    columns = {"height": pa.int32()}

    @property
    def batch_size(self) -> int:
        return self.size

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        return {"height": [None if image is None else image.shape[0] for image in batch.pixels]}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def run(store: Store, filters: dict[str, Filter], refs: list[ShardRef], **settings: Any) -> engine_module.Stats:
    return score_shards(store, plan(filters), refs, engine="inline", workers=1, **settings)


def column(store: Store, filters: dict[str, Filter], ref: ShardRef, name: str, column: str) -> list[Any]:
    one = next(one for one in plan(filters) if one.name == name)
    return list(store.read_table(ref.beside(one.folder))[column].to_pylist())


def test_filters_run_after_those_they_need_whether_new_or_already_there(store: Store) -> None:
    refs = write_shards(store)
    filters: dict[str, Filter] = {"twice": Twice(), "length": Length()}
    assert [one.name for one in plan(filters)] == ["length", "twice"]
    run(store, filters, refs)
    expected = [52, 24, 60, None, None, 8, 8, 52]
    assert column(store, filters, refs[0], "twice", "n") == expected
    store.delete(plan(filters)[1].folder, recursive=True)
    stats = run(store, filters, refs)
    assert list(stats.filters) == ["twice"]
    assert column(store, filters, refs[0], "twice", "n") == expected


def test_a_need_that_no_filter_makes_names_the_nearest() -> None:
    with pytest.raises(PairmillError, match=r"length\.n"):
        plan({"lenght": Length(), "twice": Twice()})
    with pytest.raises(PairmillError, match="no filter that makes it"):
        plan({"twice": Twice()})


def test_a_changed_need_changes_the_fingerprint_of_what_reads_it() -> None:
    before, after = (plan({"length": Length(bad), "twice": Twice()}) for bad in (-1, 1))
    assert before[0].fingerprint != after[0].fingerprint
    assert before[1].fingerprint != after[1].fingerprint
    assert fingerprint_of("a", Twice(), {}) != fingerprint_of("b", Twice(), {})


def test_a_pair_that_raises_is_null_and_counted_and_its_batch_mates_are_not(store: Store) -> None:
    refs = write_shards(store)
    filters: dict[str, Filter] = {"length": Length(bad=4)}  # two of the first shard's texts
    stats = run(store, filters, refs).filters["length"]
    assert column(store, filters, refs[0], "length", "n") == [26, 12, 30, None, None, None, None, 26]
    assert stats.errors == {"ValueError: this text can't be read": 2}
    assert (stats.pairs, stats.nulls["n"]) == (11, 4)


def test_a_filter_that_fails_at_every_pair_stops_the_run(store: Store) -> None:
    refs = write_shards(store, (20,))

    class Broken(Length):
        def score(self, batch: Batch) -> Mapping[str, list[Any]]:
            raise KeyError("texts")

    with pytest.raises(PairmillError, match="KeyError"):
        run(store, {"length": Broken()}, refs)
    assert not store.files("scores")


def test_a_filter_that_breaks_its_word_is_a_bug_not_a_bad_pair(store: Store) -> None:
    refs = write_shards(store)

    class Short(Length):
        def score(self, batch: Batch) -> Mapping[str, list[Any]]:
            return {"n": [1]}

    with pytest.raises(AssertionError, match="1 values for 3 pairs"):
        run(store, {"length": Short()}, refs)


def test_tombstones_take_effect_at_once_and_change_no_other_row(store: Store) -> None:
    refs = write_shards(store)
    filters: dict[str, Filter] = {"length": Length()}
    uids = store.read_table(refs[0].table)["uid"].to_pylist()
    run(store, filters, refs, dead={"uid": {uids[1]}, "url_key": set()})
    assert column(store, filters, refs[0], "length", "n") == [26, None, 30, None, None, 4, 4, 26]
    assert column(store, filters, refs[0], "length", "uid") == uids


def test_each_image_is_decoded_once_for_all_filters(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = write_shards(store)
    decoded: list[int] = []
    decode = images.cv2.imdecode
    monkeypatch.setattr(images.cv2, "imdecode", lambda *a: (decoded.append(1), decode(*a))[1])
    filters: dict[str, Filter] = {"a": Sides(4), "b": Sides(3), "c": Sides(2)}
    stats = run(store, filters, refs)
    assert len(decoded) == stats.decoded == 11
    assert stats.undecodable == 2
    assert column(store, filters, refs[0], "b", "height") == [48, 48, None, None, 48, 48, 48, 48]


def test_only_missing_tables_are_made(store: Store) -> None:
    refs = write_shards(store)
    filters: dict[str, Filter] = {"length": Length(), "sides": Sides()}
    run(store, filters, refs[:1])
    planned = plan(filters)
    store.delete(refs[0].beside(planned[1].folder))
    left = missing(store, planned, refs)
    assert {ref: [one.name for one in ones] for ref, ones in left.items()} == {
        refs[0]: ["sides"],
        refs[1]: ["length", "sides"],
    }


def test_a_table_of_other_pairs_is_refused(store: Store) -> None:
    refs = write_shards(store)
    filters: dict[str, Filter] = {"length": Length(), "twice": Twice()}
    planned = plan(filters)
    other = pa.table({"uid": ["0" * 32] * 8, "n": pa.array([1] * 8, pa.int32())})
    store.write_table(refs[0].beside(planned[0].folder), other)
    with pytest.raises(PairmillError, match="uids"):
        run(store, filters, refs)


def test_vectors_reach_a_filter_as_arrays_fresh_or_read(store: Store) -> None:
    @dataclass(frozen=True)
    class Vector(Filter):
        needs = ("text",)
        columns = {"v": pa.list_(pa.float16())}

        def score(self, batch: Batch) -> Mapping[str, list[Any]]:
            return {"v": [None if not text else np.full(len(text), 0.5, np.float16) for text in batch["text"]]}

    @dataclass(frozen=True)
    class Sum(Filter):
        needs = ("vector.v",)
        columns = {"sum": pa.float32()}

        def score(self, batch: Batch) -> Mapping[str, list[Any]]:
            assert all(v is None or v.dtype == np.float16 for v in batch["vector.v"])
            return {"sum": [None if v is None else float(v.sum()) for v in batch["vector.v"]]}

    refs = write_shards(store, (8, 0))
    filters: dict[str, Filter] = {"vector": Vector(), "sum": Sum()}
    run(store, filters, refs)
    assert column(store, filters, refs[0], "sum", "sum") == (expected := [13, 6, 15, None, None, 2, 2, 13])
    store.delete(plan(filters)[1].folder, recursive=True)
    run(store, filters, refs)
    assert column(store, filters, refs[0], "sum", "sum") == expected


def test_an_empty_shard_gets_empty_tables(store: Store) -> None:
    refs = write_shards(store, (0,))
    filters: dict[str, Filter] = {"length": Length(), "sides": Sides()}
    run(store, filters, refs)
    assert column(store, filters, refs[0], "sides", "height") == []


def test_names_are_found_without_a_registry() -> None:
    assert {"clip", "image_hash", "image_stats", "language", "text_stats"} <= set(names(Filter))
    with pytest.raises(PairmillError, match="text_stats"):
        load_filter("text_stat", {})
    with pytest.raises(PairmillError, match="precision"):
        load_filter("clip", {"precison": "bf16"})


def test_shards_without_a_gpu_filter_go_to_workers_without_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Heavy(Length):
        gpu = 0.25

    asked = []

    def note(function: Any, items: Any, *, gpu: float, rescue: Any, **settings: Any) -> list[engine_module.Stats]:
        asked.append((gpu, [(ref.index, names) for ref, names in items]))
        return [function(item) for item in items]

    monkeypatch.setattr(engine_module, "map_shards", note)
    refs = write_shards(store, (4, 4, 4))
    filters: dict[str, Filter] = {"length": Length(), "heavy": Heavy(), "twice": Twice()}
    store.delete(plan(filters)[1].folder, recursive=True)
    run(store, {"heavy": Heavy()}, refs[:1])
    asked.clear()
    run(store, filters, refs)
    assert asked == [
        (0.0, [(0, ["length", "twice"])]),
        (0.25, [(1, ["length", "heavy", "twice"]), (2, ["length", "heavy", "twice"])]),
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_and_inline_make_the_same_bytes(tmp_path: Path) -> None:
    """22 shards, the last one uneven, over two actors; canary shards lie in another folder and go along."""
    inline, ray = Store(tmp_path / "inline"), Store(tmp_path / "ray")
    filters = {name: small(name) for name in ("clip", "image_stats", "text_stats", "language", "image_hash")}
    done = []
    for store in (inline, ray):
        refs = write_shards(store, (8,) * 21 + (5,)) + write_shards(store, (4,), "canaries/swapped-0123456789ab/0000")
    score_shards(inline, plan(filters), refs, engine="inline", workers=1)
    with ray_session(2):
        stats = score_shards(
            ray, plan(filters), refs, engine="ray", workers=2, progress=lambda n, of: done.append((n, of))
        )
    assert stats.shards == 23 and done == [(n, 23) for n in range(1, 24)]
    assert inline.files("scores") == ray.files("scores")
    assert len(ray.files("scores")) == 23 * 5
    assert [path for path in ray.files("scores") if inline.read(path) != ray.read(path)] == []
