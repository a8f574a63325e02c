"""Images are decoded ahead of the filters, in another thread, and no further than they are needed soon."""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest

from filters import images
from filters.base import Batch, Filter
from pairs.store import Store
from tests.filters.shards import write_shards
from tests.filters.test_engine import column, run


@pytest.fixture
def store(memory_store: Store) -> Store:
    return memory_store


@dataclass(frozen=True)
class Look(Filter):
    """Notes when it looks at how many rows."""

    size: int = 32
    model: bool = True
    needs = ("pixels", "text")
    columns = {"there": pa.bool_()}

    @property
    def batch_size(self) -> int:
        return self.size

    @property
    def gpu(self) -> float:
        return 0.1 * self.model

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        SEEN.append((self.size, len(batch)))
        DECODED_AT.append(len(DECODED))
        time.sleep(0.02)
        return {"there": [look is not None for look in batch.pixels]}


SEEN: list[tuple[int, int]] = []
DECODED: list[int] = []
DECODED_AT: list[int] = []


def test_images_are_decoded_ahead_while_a_filter_looks_and_no_further_than_a_batch(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = write_shards(store, (200,))
    real, main = images.decode, threading.get_ident()
    threads = set()

    def decode(data: Any) -> Any:
        DECODED.append(1)
        threads.add(threading.get_ident())
        return real(data)

    monkeypatch.setattr(images, "decode", decode)
    SEEN.clear(), DECODED.clear(), DECODED_AT.clear()
    run(store, {"look": Look(32), "wide": Look(100)}, refs)
    assert main not in threads
    assert [n for size, n in SEEN if size == 32] == [31, 32, 32, 32, 32, 32, 8], "one pair is forgotten"
    assert [n for size, n in SEEN if size == 100] == [99, 100]
    looked = [n for size, n in SEEN]
    small_at = [at for (size, _), at in zip(SEEN, DECODED_AT, strict=True) if size == 32]
    ends = [min(sum(n for s, n in SEEN[: i + 1] if s == 32), 199) for i, (s, _) in enumerate(SEEN) if s == 32]
    assert all(end <= at <= end + 100 + 2 * images.CHUNK_ROWS for end, at in zip(ends, small_at, strict=True))
    assert sum(looked) == 2 * 199
    assert column(store, {"look": Look(32), "wide": Look(100)}, refs[0], "wide", "there")[:4] == [
        True,
        True,
        False,
        None,
    ]


def test_without_a_model_nothing_is_decoded_ahead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    refs, real = write_shards(store, (96,)), images.decode
    SEEN.clear(), DECODED.clear(), DECODED_AT.clear()
    monkeypatch.setattr(images, "decode", lambda data: (DECODED.append(1), real(data))[1])
    run(store, {"look": Look(32, model=False)}, refs)
    assert DECODED_AT == [32, 64, 95]


def test_few_big_images_are_decoded_ahead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = write_shards(store, (96,))
    monkeypatch.setattr(images, "AHEAD_BYTES", 40 * 3 * 64 * 48)
    SEEN.clear(), DECODED.clear(), DECODED_AT.clear()
    real = images.decode
    monkeypatch.setattr(images, "decode", lambda data: (DECODED.append(1), real(data))[1])
    run(store, {"look": Look(32)}, refs)
    assert all(at <= 31 + i * 32 + 2 * 32 for i, at in enumerate(DECODED_AT))
