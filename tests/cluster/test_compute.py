"""Shards are mapped alike inline and on Ray: results, errors, threads, and whose session it is."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from cluster import session
from cluster.compute import call, map_shards, one_thread
from cluster.session import ray_session
from pairs.errors import PairmillError


def square(number: int) -> tuple[int, int, int, int]:
    import cv2

    return number * number, torch.get_num_threads(), cv2.getNumThreads(), os.getpid()


def refuse(number: int) -> int:
    if number == 2:
        raise PairmillError(expected="another number", found="2", remedy="nothing")
    return number


def die_once(mark: str) -> str:
    if not Path(mark).exists():
        Path(mark).touch()
        os._exit(1)
    return mark


class Odd(Exception):
    """Doesn't pickle: its two arguments are lost on the way."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__("odd")


def fail_oddly(number: int) -> int:
    raise Odd(1, number)


def test_inline_yields_each_result_as_it_is_done() -> None:
    seen: list[int] = []

    def note(number: int) -> int:
        seen.append(number)
        return number

    results = map_shards(note, [1, 2, 3], engine="inline", workers=2)
    assert next(results) == 1
    assert seen == [1]
    assert list(results) == [2, 3]


def test_inline_computes_with_one_thread_and_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    assert list(map_shards(square, [3], engine="inline", workers=2)) == [(9, 1, 1, os.getpid())]
    assert torch.get_num_threads() == before
    with one_thread():
        assert torch.get_num_threads() == 1


def test_nothing_to_do_starts_nothing() -> None:
    assert list(map_shards(square, [], engine="ray", workers=2)) == []


def test_an_error_surfaces_inline() -> None:
    with pytest.raises(PairmillError, match="another number"):
        list(map_shards(refuse, [1, 2, 3], engine="inline", workers=1))


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    result, error, trace = pickle.loads(call(fail_oddly, 1))
    assert result is None
    assert isinstance(error, RuntimeError) and str(error) == "Odd: odd"
    assert "fail_oddly" in trace


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ray_gives_the_same_and_ends_what_it_started(tmp_path: Path) -> None:
    with ray_session(2):
        import ray

        found = list(map_shards(square, range(12), engine="ray", workers=2))
        assert sorted(row[:3] for row in found) == [(n * n, 1, 1) for n in range(12)]
        assert os.getpid() not in {row[3] for row in found}
        again = list(map_shards(square, range(4), engine="ray", workers=2))
        assert {row[3] for row in again} <= {row[3] for row in found}, "the actors stay warm"
        with pytest.raises(PairmillError, match="another number"):
            list(map_shards(refuse, [1, 2, 3], engine="ray", workers=1))
        with pytest.raises(PairmillError, match="3 died of it"):
            list(map_shards(os._exit, [1], engine="ray", workers=1))
        marks = [str(tmp_path / str(n)) for n in range(4)]
        assert sorted(map_shards(die_once, marks, engine="ray", workers=2)) == marks, "what a death took is done again"
        anew = list(map_shards(square, range(4), engine="ray", workers=2))
        assert sorted(row[0] for row in anew) == [0, 1, 4, 9], "a pool that failed is made anew"
        with ray_session(2):
            assert ray.is_initialized()
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert "RAY_AUTH_TOKEN" not in os.environ


def held(number: int) -> tuple[int, list[str]]:
    import ray

    return os.getpid(), [str(gpu) for gpu in ray.get_gpu_ids()]


def with_a_gpu(workers: int) -> None:
    import ray

    ray.init(address="local", num_cpus=workers, num_gpus=1, include_dashboard=False, object_store_memory=100 << 20)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_workers_hold_a_gpu_only_for_what_needs_it_and_no_more_than_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_start", with_a_gpu)
    with ray_session(2):
        alone = list(map_shards(held, range(4), engine="ray", workers=2))
        assert {tuple(gpus) for _, gpus in alone} == {()}
        wide = list(map_shards(held, range(4), engine="ray", workers=2, gpu=0.6))
        assert len({pid for pid, _ in wide}) == 1 and {tuple(gpus) for _, gpus in wide} == {("0",)}
        narrow = list(map_shards(held, range(4), engine="ray", workers=2, gpu=0.1))
        assert {tuple(gpus) for _, gpus in narrow} == {("0",)}
        assert not {pid for pid, _ in wide} & {pid for pid, _ in narrow}, "they end with their call"
