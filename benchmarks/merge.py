"""How much memory and time the merge of candidates takes: `python benchmarks/merge.py [rows] [workers] [engine]`.

Made-up rows (three texts each, every fifth address twice) are merged twice: into a new source, then against the
increment this made, with as many rows of which half are new. Prints seconds and the greatest
resident memory, of this process and of all its children together, sampled ten times a second.
"""

import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psutil

from pairs.recipe import FetchSpec, SourceSpec
from pairs.workspace import Workspace
from pipelines import candidates
from pipelines.sources import Context, Row, text


@dataclass(frozen=True)
class Made:
    """Rows from `start` on, in an order of chance."""

    rows: int
    start: int

    def candidates(self, context: Context) -> Iterator[Row]:
        draw = random.Random(self.start)
        for number in range(self.rows):
            image = self.start + (number if number % 5 else draw.randrange(number + 1))
            side = draw.choice(("north", "south", "west"))
            words = f"picture {image} of {self.rows}, seen from the {side} in the evening"
            texts = [text(words, "alt", "en"), text(f"{words} at {number}", "caption", "en"), text("A page", "title")]
            page = f"http://host{image % 1000}.test/pages/{number}.html"
            url = f"http://img{image % 997}.test/media/{image:09d}/large.jpg?size=full"
            yield {"url": url, "texts": texts, "page": page, "found": "img", "position": number % 50}


class Peak:
    """The greatest resident memory of this process and its children while the block lasts, in bytes."""

    def __enter__(self) -> "Peak":
        self.own = self.all = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.1):
            sizes = [_resident(process) for process in (me, *me.children(recursive=True))]
            self.own, self.all = max(self.own, sizes[0]), max(self.all, sum(sizes))


def _resident(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)
    except psutil.Error:
        return 0


def main() -> None:
    given: list[Any] = [*sys.argv[1:], *["2000000", "1", "inline"][len(sys.argv) - 1 :]]
    rows, workers, engine = int(given[0]), int(given[1]), given[2]
    spec = SourceSpec.model_validate({"kind": "urls", "path": "made"})
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace.open(f"{folder}/work", create=True)
        for start in (0, rows // 2):
            candidates.load_source = lambda *_, start=start: Made(rows, start)  # type: ignore[assignment]
            candidates._settings = lambda *_: "{}"  # type: ignore[assignment]
            began = time.monotonic()
            with Peak() as peak:
                counts = candidates.cut_increment(
                    workspace, "made", spec, FetchSpec(), lambda *_: None, engine, workers
                )
            print(
                json.dumps(
                    {"engine": engine, "workers": workers, "found": counts.found, "new": counts.new}
                    | {"dropped": counts.dropped, "seconds": round(time.monotonic() - began, 1)}
                    | {"own_mb": peak.own >> 20, "all_mb": peak.all >> 20}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
