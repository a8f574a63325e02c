"""Pairs that kill the process that looks at them: a real segfault in a filter and in the decoder, a filter that takes
all memory. The run goes on, and the tables are those of a run in which these pairs couldn't be measured."""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster import guard
from cluster.guard import Crashed, Guard
from cluster.session import ray_session
from filters.base import Batch, Filter
from filters.engine import SCORING, plan, score_shards
from filters.measure import FilterStats, as_table, here, measure
from filters.score_tables import errors_of
from pairs.errors import PairmillError
from pairs.shard import ShardRef
from pairs.store import Store
from tests.filters.shards import write_shards

KILLERS = {"picture 5": "segfault", "picture 11": "segfault", "picture 6": "hog"}


def segfault() -> None:
    ctypes.string_at(0)


def hog() -> None:
    """What the kernel does to a process that has taken all memory."""
    taken = bytearray(64 << 20)
    assert taken[::4096]
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fragile(Filter):
    """Length of the last text. Dies of some pairs, or raises (`dies` off), which must make the same values."""

    dies: bool = True
    kills: tuple[str, ...] = tuple(KILLERS)
    size: int = 4
    needs = ("texts",)
    columns = {"n": pa.int32()}

    @property
    def batch_size(self) -> int:
        return self.size

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        texts = [entries[-1]["text"] if entries else "" for entries in batch["texts"]]
        for text in (text for text in texts if text in self.kills):
            if not self.dies:
                raise ValueError("fragile")
            globals()[KILLERS[text]]()
        return {"n": [len(text) for text in texts]}


@dataclass(frozen=True)
class Sturdy(Filter):
    """Half of the same, from `fragile.n`, and the image's height."""

    needs = ("fragile.n", "pixels")
    columns = {"half": pa.float32(), "height": pa.int32()}

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        return {
            "half": [None if n is None else n / 2 for n in batch["fragile.n"]],
            "height": [None if look is None else look.shape[0] for look in batch.pixels],
        }


FILTERS: dict[str, Filter] = {"fragile": Fragile(), "sturdy": Sturdy()}


def tables(store: Store, refs: list[ShardRef], filters: Mapping[str, Filter]) -> list[Any]:
    return [store.read_table(ref.beside(one.folder)) for one in plan(filters) for ref in refs]


def suspect(store: Store, ref: ShardRef) -> None:
    """Leaves the mark of a process that died at the shard."""
    store.write(ref.beside(SCORING).removesuffix(".parquet"), "")


def threads() -> tuple[int, int]:
    import cv2
    import torch

    return torch.get_num_threads(), cv2.getNumThreads()


def test_a_child_that_dies_is_told_by_its_signal_and_the_next_question_gets_another() -> None:
    with Guard() as one:
        assert one.ask(os.getpid) != os.getpid()
        first = one.ask(os.getpid)
        assert one.ask(os.getpid) == first, "one child answers until it dies"
        with pytest.raises(Crashed, match=r"^crashed: SIGSEGV$"):
            one.ask(ctypes.string_at, 0)
        with pytest.raises(Crashed, match="exit code 3"):
            one.ask(os._exit, 3)
        with pytest.raises(ZeroDivisionError):
            one.ask(divmod, 1, 0)
        assert one.ask(os.getpid) != first
        assert one.ask(threads) == (1, 1)


def end_of_file() -> None:
    """What PIL raises at a truncated GIF."""
    raise EOFError("no more images in GIF file")


def refused() -> None:
    raise ConnectionRefusedError


def test_an_end_of_file_that_a_filter_meets_is_no_death(monkeypatch: pytest.MonkeyPatch) -> None:
    with Guard() as one:
        first = one.ask(os.getpid)
        for kind, function in ((EOFError, end_of_file), (ConnectionRefusedError, refused)):
            with pytest.raises(kind):
                one.ask(function)
        monkeypatch.setattr(end_of_file, "__qualname__", "only_here")
        monkeypatch.setattr(sys.modules[__name__], "only_here", end_of_file, raising=False)
        with pytest.raises(AttributeError, match="only_here"):
            one.ask(end_of_file)
        assert one.ask(os.getpid) == first


def test_a_child_that_lives_without_its_pipe_is_waited_for_a_while_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "END_S", 0.2)
    with Guard() as one, pytest.raises(Crashed, match="SIGKILL"):
        one.ask(exec, "import os, time\nos.closerange(3, 100)\ntime.sleep(50)")


def test_a_child_that_does_not_start_is_no_pairs_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    batch = Batch(["a", "b"], {"texts": [[{"text": "x"}]] * 2})
    with Guard() as one:
        with pytest.raises(PairmillError, match=r"SIGKILL, out of memory\? before it was asked"):
            measure(Fragile(), batch, FilterStats(), one.ask)
        (tmp_path / "sitecustomize.py").unlink()
        assert one.ask(int, 5) == 5


def test_a_filter_that_always_dies_is_no_pairs_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "DEATHS", 3)
    with Guard() as one:
        for _ in range(2):
            with pytest.raises(Crashed):
                one.ask(os.abort)
        assert one.ask(int, 5) == 5
        for _ in range(2):
            with pytest.raises(Crashed, match="SIGABRT"):
                one.ask(os.abort)
        with pytest.raises(PairmillError, match="SIGABRT at every one"):
            one.ask(os.abort)


def test_a_child_that_takes_too_much_memory_is_killed_before_the_machine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "free_bytes", lambda: 1 << 30)
    with Guard() as one, pytest.raises(Crashed, match="SIGKILL, out of memory"):
        one.ask(exec, "taken = []\nwhile True: taken.append(bytearray(b'x') * (32 << 20))")


def test_crashes_are_isolated_by_halving_and_the_others_are_measured_as_if_they_were_forgotten() -> None:
    texts = [[{"text": f"picture {i}"}] for i in range(4, 12)]
    batch, stats = Batch([str(i) for i in range(8)], {"texts": texts}), FilterStats()
    deaths, asked = [], []

    def ask(function: Any, *arguments: Any) -> Any:
        asked.append(len(arguments[-1]))
        try:
            return one.ask(function, *arguments)
        except Crashed as crash:
            deaths.append(crash)
            raise

    with Guard() as one:
        table, failed = measure(Fragile(kills=("picture 5",)), batch, stats, ask)
    assert failed == {1: "crashed: SIGSEGV"} and stats.errors == {"crashed: SIGSEGV": 1}
    assert table["n"].to_pylist() == [9, None, 9, 9, 9, 9, 10, 10]
    assert len(deaths) == 4, "log2 of the batch, and the first"
    assert asked[-1] == 7, "the others together"
    assert (
        as_table(Fragile(kills=()), batch.take([0, *range(2, 8)]))["n"].to_pylist()
        == table["n"].drop_null().to_pylist()
    )


def test_a_suspect_shard_is_scored_inline_with_the_culprits_null_and_told(tmp_path: Path) -> None:
    dying, raising = Store(tmp_path / "a"), Store(tmp_path / "b")
    refs = write_shards(dying, (8,)) and write_shards(raising, (8,))
    suspect(dying, refs[0])
    stats = score_shards(dying, plan(FILTERS), refs, engine="inline", workers=1)
    tame = {"fragile": Fragile(dies=False), "sturdy": Sturdy()}
    score_shards(raising, plan(tame), refs, engine="inline", workers=1)
    assert stats.filters["fragile"].errors == {"crashed: SIGSEGV": 1, "crashed: SIGKILL, out of memory?": 1}
    assert not stats.filters["sturdy"].errors, "the right filter is blamed"
    found, expected = tables(dying, refs, FILTERS), tables(raising, refs, tame)
    assert [t.to_pylist() for t in found] == [t.to_pylist() for t in expected]
    assert errors_of(found[0].schema) == {"crashed: SIGSEGV": [5], "crashed: SIGKILL, out of memory?": [6]}
    assert errors_of(found[1].schema) == {}
    assert not dying.files(SCORING)


def test_an_image_that_kills_the_decoder_is_one_that_does_not_decode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    refs = write_shards(store, (8,))
    table = store.read_table(refs[0].table)
    start, size = (table[name][6].as_py() for name in ("image_offset", "image_size"))
    image = store.read(refs[0].tar)[start : start + size]
    boobytrap = f"import cv2, ctypes\nreal = cv2.imdecode\nBAD = bytes.fromhex('{image.hex()}')\n"
    boobytrap += "cv2.imdecode = lambda data, how: ctypes.string_at(0) if data.tobytes() == BAD else real(data, how)\n"
    (tmp_path / "sitecustomize.py").write_text(boobytrap)
    monkeypatch.syspath_prepend(str(tmp_path))
    suspect(store, refs[0])
    filters: dict[str, Filter] = {"fragile": Fragile(kills=()), "sturdy": Sturdy()}
    stats = score_shards(store, plan(filters), refs, engine="inline", workers=1)
    fragile, sturdy = tables(store, refs, filters)
    assert sturdy["height"].to_pylist() == [48, 48, None, None, 48, 48, None, 48]
    assert fragile["n"].null_count == 1, "the forgotten one"
    assert errors_of(sturdy.schema) == {"crashed: SIGSEGV while decoding": [6]} and errors_of(fragile.schema) == {}
    assert (stats.undecodable, stats.crashes) == (2, {"crashed: SIGSEGV": 1})


INLINE = """
import sys, json
from filters.engine import plan, score_shards
from pairs.shard import list_shards
from pairs.store import Store
from tests.filters.test_crashes import FILTERS
store = Store(sys.argv[1])
stats = score_shards(store, plan(FILTERS), list_shards(store, "pairs"), engine="inline", workers=1)
print(json.dumps(stats.filters["fragile"].errors))
"""


def run_inline(store: Store) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", INLINE, store.root], capture_output=True, text=True)


@pytest.mark.slow
def test_inline_dies_once_and_the_same_command_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path)
    refs = write_shards(store, (8, 5))
    assert run_inline(store).returncode == -signal.SIGSEGV
    assert store.files(SCORING)
    again = run_inline(store)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == {"crashed: SIGSEGV": 1, "crashed: SIGKILL, out of memory?": 1}
    assert len(store.files("scores")) == 4 and not store.files(SCORING)
    assert tables(store, refs, FILTERS)[0]["n"].null_count == 3


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ray_goes_on_and_makes_the_bytes_of_the_inline_run(tmp_path: Path) -> None:
    inline, ray = Store(tmp_path / "inline"), Store(tmp_path / "ray")
    refs = write_shards(inline, (8, 5)) and write_shards(ray, (8, 5))
    suspect(inline, refs[0])
    score_shards(inline, plan(FILTERS), refs, engine="inline", workers=1)
    with ray_session(1):
        stats = score_shards(ray, plan(FILTERS), refs, engine="ray", workers=1)
    assert stats.filters["fragile"].errors == {"crashed: SIGSEGV": 1, "crashed: SIGKILL, out of memory?": 1}
    assert [path for path in ray.files("scores") if inline.read(path) != ray.read(path)] == []


def test_what_a_guard_is_not_needed_for_is_measured_here() -> None:
    batch = Batch(["a"], {"texts": [[{"text": "x"}]]})
    assert measure(Fragile(), batch, FilterStats(), here)[0]["n"].to_pylist() == [1]
