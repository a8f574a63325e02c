"""Maps a plain function over shards: on Ray actors, or inline in this process, with equal bytes.

Items and results are small (references, statistics); pixels stay inside the function. Both engines compute with one
thread per process, because a sum's order, and so its last bits, depends on the number of threads, and Ray's own
OMP_NUM_THREADS is ignored when a worker is reused (ray #30496). A failure surfaces as the exception that was raised.

The actors live as long as their Ray session, so what a filter has loaded stays loaded: importing torch, open_clip and
transformers costs each of them about 12 s of CPU, once. Where there are GPUs each holds its share of them and ends with
the call, because training needs them next; on a cluster too, whose CPUs others wait for. See docs/decisions/0007.
"""

import contextlib
import os
import pickle
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from cluster.session import ray_session
from pairs.errors import PairmillError

Item = TypeVar("Item")
Result = TypeVar("Result")
Engine = Literal["ray", "inline"]
START_S = 300.0  # in which the first actor has to run
RETRIES = 2
_pools: dict[str, list[Any]] = {}  # idle actors by Ray session


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch and OpenCV compute with one thread inside the block."""
    import cv2
    import torch

    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def map_shards(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    engine: Engine,
    workers: int,
) -> Iterator[Result]:
    """Yields `function(item)` for every item, in the order in which they finish.

    `workers` actors (one process each, with its share of the GPUs) on "ray"; "inline" uses this process alone.
    Function and items have to pickle. What the function raises surfaces; an item whose actor dies is tried by another
    one, `RETRIES` times, before that is a PairmillError.
    """
    if not items:
        return iter(())
    return _inline(function, items) if engine == "inline" else _on_ray(function, items, workers)


def _inline(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    for item in items:
        with one_thread():
            result = function(item)
        yield result


class _Actor:
    """One process of the pool. Results travel as pickled bytes, whatever they are."""

    def ready(self) -> None:
        """Answers once the process runs."""

    def run(self, function: Callable[[Any], Any], item: Any) -> bytes:
        with one_thread():
            return _call(function, item)


def _call(function: Callable[[Any], Any], item: Any) -> bytes:
    try:
        return pickle.dumps((function(item), None, ""))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps((None, error, trace))


def _on_ray(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    with ray_session(workers), _actors(min(workers, len(items)), workers) as pool:
        import ray

        shared, left, tries = ray.put(function), list(reversed(range(len(items)))), Counter[int]()
        starting = {actor.ready.remote(): actor for actor in pool}  # a cluster may give fewer than were asked for
        running: dict[Any, tuple[Any, int]] = {}
        while left or running:
            done, _ = ray.wait([*starting, *running], num_returns=1, timeout=None if running else START_S)
            if not done:
                raise PairmillError(
                    expected=f"Ray to start a worker within {START_S:.0f} s",
                    found=f"none; free now: {ray.available_resources()}",
                    remedy="take fewer `workers`, or wait until the cluster has a free CPU for each",
                )
            actor, item = running.pop(done[0]) if done[0] in running else (starting.pop(done[0]), -1)
            try:
                told = ray.get(done[0])
            except ray.exceptions.RayError as died:  # out of memory, a crash, a lost node
                tries[item] += 1
                if tries[item] > RETRIES + (len(pool) if item < 0 else 0):  # idle ones may all have died meanwhile
                    raise _died(items[item] if item >= 0 else "its start", died) from died
                left += [item] * (item >= 0)
                pool[pool.index(actor)] = actor = _new(workers)
                starting[actor.ready.remote()] = actor
                continue
            if item >= 0:
                yield _result(told)
            if left:
                item = left.pop()
                running[actor.run.remote(shared, items[item])] = (actor, item)


def _result(told: bytes) -> Any:
    result, error, trace = pickle.loads(told)
    if error is not None:
        error.add_note(f"raised in a Ray actor:\n{trace}")
        raise error
    return result


def _died(item: object, died: Exception) -> PairmillError:
    return PairmillError(
        expected=f"a Ray worker to finish {str(item)[:200]}",
        found=f"{RETRIES + 1} died of it: {' '.join(str(died).split())[:300]}",
        remedy="give it more memory or take fewer `workers`, then run the same command again: what is done stays",
    )


def _new(workers: int) -> Any:
    """An actor with a CPU and, where the session has GPUs, its share of them."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0.0)
    return ray.remote(_Actor).options(num_cpus=1, num_gpus=min(1.0, gpus / workers)).remote()


@contextlib.contextmanager
def _actors(count: int, workers: int) -> Iterator[list[Any]]:
    """`count` actors of this session. On a machine of our own without a GPU they stay for the next call; elsewhere, and
    where the block failed, they end with it."""
    import ray

    context = ray.get_runtime_context()
    session = f"{context.get_node_id()} {context.get_job_id()}"
    for gone in [name for name in _pools if name != session]:
        del _pools[gone]
    kept, whole = _pools.pop(session, []), False
    actors = kept[:count] + [_new(workers) for _ in range(count - len(kept))]
    try:
        yield actors
        whole = True
    finally:
        if whole and "RAY_ADDRESS" not in os.environ and not ray.cluster_resources().get("GPU"):
            _pools[session] = actors + kept[count:]
        else:
            for actor in actors:
                ray.kill(actor)
