"""Maps a plain function over shards: on Ray actors, or inline in this process, with equal bytes.

Items and results are small (references, statistics); pixels stay inside the function. Both engines compute with one
thread per process, because a sum's order, and so its last bits, depends on the number of threads, and Ray's own
OMP_NUM_THREADS is ignored when a worker is reused (ray #30496). A failure surfaces as the exception that was raised.

The actors live as long as their Ray session, so what a filter has loaded stays loaded: importing torch, open_clip and
transformers costs each of them about 12 s of CPU, once. Actors that hold a share of a GPU end with the call
instead, because training needs it next. See docs/decisions/0007.
"""

import contextlib
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from cluster.session import ray_session
from pairs.errors import PairmillError

Item = TypeVar("Item")
Result = TypeVar("Result")
Engine = Literal["ray", "inline"]
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
    gpus: float = 0.0,
) -> Iterator[Result]:
    """Yields `function(item)` for every item, in the order in which they finish.

    `workers` actors (one process each, with a share `gpus` of a GPU) on "ray"; "inline" uses this process alone.
    Function and items have to pickle. Raises what the function raised, and PairmillError where an actor died.
    """
    if not items:
        return iter(())
    return _inline(function, items) if engine == "inline" else _on_ray(function, items, workers, gpus)


def _inline(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    for item in items:
        with one_thread():
            result = function(item)
        yield result


class _Actor:
    """One process of the pool. Results travel as pickled bytes, whatever they are."""

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


def _on_ray(function: Callable[[Any], Any], items: Sequence[Any], workers: int, gpus: float) -> Iterator[Any]:
    with ray_session(workers), _actors(min(workers, len(items)), gpus) as free:
        import ray

        shared, left = ray.put(function), list(reversed(items))
        running: dict[Any, tuple[Any, Any]] = {}
        while left or running:
            while left and free:
                item, actor = left.pop(), free.pop()
                running[actor.run.remote(shared, item)] = (actor, item)
            done, _ = ray.wait(list(running), num_returns=1)
            actor, item = running.pop(done[0])
            yield _result(done[0], item)
            free.append(actor)


def _result(reference: Any, item: Any) -> Any:
    import ray

    try:
        result, error, trace = pickle.loads(ray.get(reference))
    except ray.exceptions.RayActorError as died:
        raise PairmillError(
            expected=f"a Ray worker to finish {str(item)[:200]}",
            found=f"it died: {' '.join(str(died).split())[:300]}",
            remedy="give it more memory or take fewer `workers`, then run the same command again: what is done stays",
        ) from died
    if error is not None:
        error.add_note(f"raised in a Ray actor:\n{trace}")
        raise error
    return result


@contextlib.contextmanager
def _actors(count: int, gpus: float) -> Iterator[list[Any]]:
    """`count` idle actors of this session. They stay for the next call, unless they hold a GPU or the block failed:
    then some may still be at work."""
    import ray

    session = ray.get_runtime_context().get_node_id()
    for gone in [name for name in _pools if name != session]:
        del _pools[gone]
    kept = [] if gpus else _pools.pop(session, [])
    new = ray.remote(_Actor).options(num_cpus=1, num_gpus=gpus)
    actors = kept[:count] + [new.remote() for _ in range(count - len(kept))]
    spare, whole = kept[count:], False
    try:
        yield list(actors)
        whole = True
    finally:
        if whole and not gpus:
            _pools[session] = actors + spare
        else:
            for actor in actors:
                ray.kill(actor)
