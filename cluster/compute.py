"""Maps a plain function over shards: on Ray actors, or inline in this process, with equal bytes.

Items and results are small (references, statistics); pixels stay inside the function. Both engines compute with one
thread per process, because a sum's order, and so its last bits, depends on the number of threads, and Ray's own
OMP_NUM_THREADS is ignored when a worker is reused (ray #30496). A failure surfaces as the exception that was raised.

The actors live as long as their Ray session, so what a filter has loaded stays loaded: importing torch, open_clip and
transformers costs each of them about 12 s of CPU, once. Those that hold a share of a GPU end with the call, because
training needs it next; on a cluster all do, whose CPUs others wait for. See docs/decisions/0007.
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
    """torch, OpenCV, and the BLAS of numpy compute with one thread inside the block. Costs about 1 ms."""
    import cv2
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(1):
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
    gpu: float = 0.0,
    rescue: Callable[[Item], Result] | None = None,
) -> Iterator[Result]:
    """Yields `function(item)` for every item, in the order in which they finish.

    `workers` actors (one process each) on "ray"; "inline" uses this process alone. `gpu` is the share of a GPU, in
    [0, 1], that one worker needs at least: where the session has GPUs no more actors run than they have room for, and
    they share all of it; with 0 they hold none. Function and items have to pickle. What the function raises surfaces;
    an item whose actor dies is tried by another one, `RETRIES` times, before that is a PairmillError. With `rescue`
    that is called, in an actor, for an item that two actors died of.
    """
    if not items:
        return iter(())
    if engine == "inline":
        return _inline(function, items)
    attempts = [function, function, *([rescue, rescue] if rescue else [function] * (RETRIES - 1))]
    return _on_ray(attempts, items, workers, gpu)


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
            return call(function, item)


def call(function: Callable[[Any], Any], item: Any) -> bytes:
    """The pickled (result, error, traceback) of `function(item)`; `result` opens it in another process."""
    try:
        return pickle.dumps((function(item), None, ""))
    except Exception as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        return pickle.dumps((None, error, trace))


def _on_ray(attempts: Sequence[Callable[[Any], Any]], items: Sequence[Any], workers: int, gpu: float) -> Iterator[Any]:
    """`attempts` are the functions of an item's first, second, … try."""
    with ray_session(workers), _actors(len(items), workers, gpu) as (pool, new):
        import ray

        shared = [ray.put(function) for function in attempts]
        left, tries = list(reversed(range(len(items)))), Counter[int]()
        starting = {actor.ready.remote(): actor for actor in pool}  # a cluster may give fewer than were asked for
        running: dict[Any, tuple[Any, int]] = {}
        idle: list[Any] = []
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
                if tries[item] >= len(attempts) + (len(pool) if item < 0 else 0):  # idle ones may all have died
                    raise _died(items[item] if item >= 0 else "its start", tries[item], died) from died
                left += [item] * (item >= 0)
                pool.remove(actor)
                if not idle:  # another may have nowhere to start while idle ones hold the CPUs
                    pool.append(new())
                    starting[pool[-1].ready.remote()] = pool[-1]
            else:
                idle.append(actor)
                if item >= 0:
                    yield result(told, "a Ray actor")
            while idle and left:
                actor, item = idle.pop(), left.pop()
                running[actor.run.remote(shared[tries[item]], items[item])] = (actor, item)


def result(told: bytes, where: str) -> Any:
    """What `call` gave, or its error with the traceback of `where`."""
    value, error, trace = pickle.loads(told)
    if error is not None:
        error.add_note(f"raised in {where}:\n{trace}")
        raise error
    return value


def _died(item: object, times: int, died: Exception) -> PairmillError:
    return PairmillError(
        expected=f"a Ray worker to finish {str(item)[:200]}",
        found=f"{times} died of it: {' '.join(str(died).split())[:300]}",
        remedy="give it more memory or take fewer `workers`, then run the same command again: what is done stays",
    )


@contextlib.contextmanager
def _actors(items: int, workers: int, gpu: float) -> Iterator[tuple[list[Any], Callable[[], Any]]]:
    """At most one actor per item, and what makes another. On a machine of our own those without a GPU stay for the next
    call; elsewhere, and where the block failed, they end with it."""
    import ray

    gpus = ray.cluster_resources().get("GPU", 0.0) if gpu else 0.0
    share = min(1.0, max(gpu, gpus / workers)) if gpus else 0.0
    count = min(workers, items, max(1, int(gpus / share)) if share else workers)
    new = ray.remote(_Actor).options(num_cpus=1, num_gpus=share).remote
    context = ray.get_runtime_context()
    session = f"{context.get_node_id()} {context.get_job_id()}"
    for gone in [name for name in _pools if name != session]:
        del _pools[gone]
    kept, whole = _pools.pop(session, []), False
    while share and kept:
        ray.kill(kept.pop())  # the CPUs that they hold are needed
    actors = kept[:count] + [new() for _ in range(count - len(kept))]
    try:
        yield actors, new
        whole = True
    finally:
        if whole and "RAY_ADDRESS" not in os.environ and not share:
            _pools[session] = actors + kept[count:]
        else:
            for actor in actors:
                ray.kill(actor)
