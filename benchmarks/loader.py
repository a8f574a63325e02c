"""The loader alone against webdataset's on the same shards: pairs per second, processor time per pair, time to resume.

    python benchmarks/loader.py FOLDER [--workers 1 2] [--budget 64 196] [--batch 256] [--batches 24] [--repeats 5]

FOLDER holds pairs as `real_pairs.py` makes them; they are written into shards first. Ours: packed batches at native
aspect within the budget of 16 px patches, jittered, texts as tokens, by so many decoder processes. Theirs: the pipeline
of open_clip_train (shards split over workers, sample shuffle of 5,000, PIL, its transforms to a square of the same
number of pixels, its tokenizer, batches made in the workers, WebLoader with persistent workers), once as it is and once
with OpenCV in PIL's place and uint8 squares, without crops, which its documentation allows. They take turns within a
repeat; the first batches of each, while workers start, aren't counted. Resume: time to the first batch of the epoch's
middle beyond that to its very first; theirs must read and drop the samples before it, here without decoding them.
`CPU ms` is processor time of all processes. Prints a Markdown table; run it alone on the machine.
"""

import argparse
import functools
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import open_clip
import psutil
import torch
import webdataset as wds
from open_clip_train.data import filter_no_caption_or_no_image
from real_pairs import as_shards

from pairs.pretrain import ModelSpec, PretrainSpec
from pairs.store import Store
from training.data import Loader
from training.plan import Cost, Plan
from training.tables import make_plan

PATCH_PX, WARM = 16, 4  # batches that aren't counted
SHUFFLE = {"bufsize": 5000, "initial": 1000}  # open_clip_train's
Batches = Iterator[Any]
Start = Callable[[int, int], Batches]  # by worker processes and the batch to begin at


def ours(plan: Plan, store: Store, workers: int, start: int) -> Batches:
    loader = Loader(plan, store, 0, 1, Cost((12, 768), (12, 512)), PATCH_PX, 0.1, workers=workers)
    return loader.batches(start, 1_000_000)


def square(data: bytes, side: int) -> torch.Tensor:
    """The image as OpenCV decodes and resizes it, (3, side, side) uint8."""
    picture = cv2.resize(cv2.imdecode(np.frombuffer(data, np.uint8), 1), (side, side), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(np.ascontiguousarray(picture[:, :, ::-1].transpose(2, 0, 1)))


def theirs(tars: list[str], side: int, batch: int, opencv: bool, workers: int, start: int) -> Batches:
    tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=77)
    look = open_clip.image_transform(side, is_train=True, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
    image = functools.partial(square, side=side) if opencv else look
    dataset = wds.DataPipeline(
        wds.SimpleShardList(tars * 1000),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.slice(start * batch // workers, 10**9),
        wds.shuffle(**SHUFFLE),
        wds.select(filter_no_caption_or_no_image),
        *([] if opencv else [wds.decode("pilrgb")]),
        wds.rename(image="jpg", text="txt"),
        wds.map_dict(image=image, text=lambda text: tokenizer(text if isinstance(text, str) else text.decode())[0]),
        wds.to_tuple("image", "text"),
        wds.batched(batch, partial=False),
    )
    return iter(wds.WebLoader(dataset, batch_size=None, shuffle=False, num_workers=workers, persistent_workers=True))


def processor_s() -> float:
    """Seconds of this process and its living children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def speed(batches: Batches, batch: int, count: int) -> tuple[float, float]:
    """Pairs per second, and processor milliseconds per pair."""
    for _ in itertools.islice(batches, WARM):
        pass
    clock, cpu = time.perf_counter(), processor_s()
    for _ in itertools.islice(batches, count):
        pass
    spent = time.perf_counter() - clock, processor_s() - cpu
    close(batches)
    return batch * count / spent[0], 1000 * spent[1] / (batch * count)


def first(start: Callable[[], Batches]) -> float:
    """Seconds to the first batch."""
    began = time.perf_counter()
    batches = start()
    next(batches)
    spent = time.perf_counter() - began
    close(batches)
    return spent


def close(batches: Batches) -> None:
    if hasattr(batches, "close"):
        batches.close()
    elif hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


def told(values: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(loaders: dict[str, Start], workers: int, budget: int, middle: int, arguments: argparse.Namespace) -> None:
    """A row for each loader; ratios are of the same repeat."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    costs: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(arguments.repeats):
        for name, start in loaders.items():
            rate, cost = speed(start(workers, 0), arguments.batch, arguments.batches)
            rates[name].append(rate)
            costs[name].append(cost)
    for name, start in loaders.items():
        ratios = [own / other for own, other in zip(rates["ours"], rates[name], strict=True)]
        resume = [first(lambda: start(workers, middle)) - first(lambda: start(workers, 0)) for _ in range(3)]  # noqa: B023
        cells = (budget, workers, name, told(rates[name], 0), told(ratios), told(costs[name]), told(resume, 2))
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, values in {"--workers": [1, 2], "--budget": [64, 196]}.items():
        parser.add_argument(name, type=int, nargs="+", default=values)
    for name, value in {"--batch": 256, "--batches": 24, "--repeats": 5}.items():
        parser.add_argument(name, type=int, default=value)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, webdataset {wds.__version__}, OpenCV {cv2.__version__}\n")
    print("| patches | workers | loader | pairs/s | ours / this | CPU ms a pair | s more to resume in mid-epoch |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        pins = as_shards(arguments.folder, store, 500)
        tars = [f"{folder}/{pin.ref.tar}" for pin in pins]
        model = ModelSpec(patch_px=PATCH_PX, image_px=224, context=77)
        for budget, workers in itertools.product(arguments.budget, arguments.workers):
            spec = PretrainSpec(model=model, max_patches=budget, batch_pairs=arguments.batch)
            plan, _ = make_plan(store, pins, spec)
            rest = tars, round(budget**0.5) * PATCH_PX, arguments.batch
            loaders: dict[str, Start] = {
                "ours": functools.partial(ours, plan, store),
                "webdataset, PIL": functools.partial(theirs, *rest, False),
                "webdataset, OpenCV": functools.partial(theirs, *rest, True),
            }
            table(loaders, workers, budget, len(plan) // arguments.batch // 2, arguments)


if __name__ == "__main__":
    main()
