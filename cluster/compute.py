"""Maps a plain function over shards: on a Ray Data actor pool, or inline in this process, with equal bytes.

Items and results are small (references, statistics); pixels stay inside the function. Both engines compute with one
thread per process, because a sum's order, and so its last bits, depends on the number of threads, and Ray's own
OMP_NUM_THREADS is ignored when a worker is reused (ray #30496). A failure surfaces as the exception that was
raised. Cost on Ray: 5 to 10 s until the first result (each actor imports Ray Data and torch), then a few ms an item;
one call over many shards therefore beats many calls.
"""

import contextlib
import functools
import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

from cluster.session import ray_session

Item = TypeVar("Item")
Result = TypeVar("Result")
Engine = Literal["ray", "inline"]


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
    setup: Callable[[], object] | None = None,
    gpus: float = 0.0,
) -> Iterator[Result]:
    """Yields `function(item)` for every item, in the order in which they finish.

    `workers` actors (one process each, with a share `gpus` of a GPU) on "ray"; "inline" uses this process alone.
    `setup` runs once in each process before its first item. Function and items have to pickle.
    """
    engines: dict[str, Callable[..., Iterator[Result]]] = {
        "ray": functools.partial(_on_ray, gpus=gpus),
        "inline": _inline,
    }
    return engines[engine](function, items, min(workers, len(items)), setup) if items else iter(())


def _inline(function: Callable[[Any], Any], items: Sequence[Any], workers: int, setup: Any) -> Iterator[Any]:
    for number, item in enumerate(items):
        with one_thread():
            if setup and number == 0:
                setup()
            result = function(item)
        yield result


class _Actor:
    """One process of the pool. Results travel as pickled bytes: one binary column, whatever they are."""

    def __init__(
        self, function: Callable[[Any], Any], items: Sequence[Any], setup: Callable[[], object] | None
    ) -> None:
        self.function, self.items = function, items
        with one_thread():
            if setup:
                setup()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        with one_thread():
            return {"result": [_call(self.function, self.items[int(position)]) for position in batch["item"]]}


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


def _on_ray(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, setup: Any, gpus: float
) -> Iterator[Any]:
    with ray_session(workers):
        import ray

        data = ray.data.from_items([{"item": i} for i in range(len(items))], override_num_blocks=len(items))
        pool = ray.data.ActorPoolStrategy(size=workers)
        where = {"num_cpus": 1, "num_gpus": gpus}
        arguments = (function, list(items), setup)
        mapped = data.map_batches(_Actor, fn_constructor_args=arguments, compute=pool, batch_size=1, **where)
        for row in mapped.iter_rows():
            result, error, trace = pickle.loads(row["result"])
            if error is not None:
                error.add_note(f"raised in a Ray actor:\n{trace}")
                raise error
            yield result
