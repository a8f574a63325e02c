"""Compaction: small increments become one, and nothing that anybody knew of them is lost or done again."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiohttp import web

from pairs.errors import PairmillError
from pairs.shard import list_shards, read_shard
from pairs.store import Store
from pairs.verify import verify
from pairs.workspace import Workspace
from pipelines import stages
from pipelines.compact import compact
from pipelines.console import Console
from pipelines.run import Run, open_run
from tests.pipelines import flow
from tests.pipelines.small_web import ALLOW, SmallWeb, small_web

LATE = 2  # how often /late.png fails before it comes
BATCHES = [range(0, 7), range(7, 12), range(12, 15), range(15, 20)]


@dataclass
class Scheduled:
    """A workspace to which nightly runs add; `site` counts what is asked for."""

    root: Path
    site: SmallWeb
    space: Path

    def add(self, names: list[str]) -> None:
        """Puts addresses on the list; one that stands there already isn't new."""
        path = self.root / "web.csv"
        known = path.read_text() if path.exists() else "url,text\n"
        path.write_text(known + "".join(f"{self.site.url(name)},a box of number {name[1:-4]}\n" for name in names))

    def run(self, space: Path | None = None) -> Run:
        """The next nightly run, to its report."""
        run = open_run(self.root / "recipe.yaml", workspace=str(space or self.space), console=Console(True), new=True)
        with run.workspace.lock():
            stages.crawl(run)
            stages.fetch(run)
            stages.curate(run, 1, {"name": "none", "models": {}})
            stages.report(run)
        return run

    @property
    def workspace(self) -> Workspace:
        return Workspace.open(self.space)


def nightly(root: Path) -> dict[str, Any]:
    source = {"kind": "urls", "path": f"{root}/web.csv", "columns": {"url": "url", "text": "text"}, "allow": ALLOW}
    return {
        "name": "nightly",
        "sources": {"web": source},
        "fetch": {"side_px": 64, "shard_pairs": 4, "attempts": 1, "retry_hours": 0, "deadline_s": 5},
        "filters": {"image_stats": {}, "text_stats": {}, "image_hash": {}},
        "reducers": {"exact_duplicates": {}, "near_duplicates": {}},
        "keep": [
            {"column": "image_stats.shorter_side_px", "min": 24},
            {"column": "image_stats.entropy", "top_fraction": 0.9},
            {"one_per": "near_duplicates.group"},
        ],
        "canaries": {"per_defect": 0},
        "engine": "inline",
    }


def routes() -> dict[str, Any]:
    left = {"late": LATE}

    async def late(_: web.Request) -> web.StreamResponse:
        left["late"] -= 1
        return web.Response(status=503) if left["late"] >= 0 else web.Response(body=flow.drawing(99))

    async def never(_: web.Request) -> web.StreamResponse:
        return web.Response(status=503)

    shown: dict[str, Any] = {f"/{i}.png": flow.drawing(i % 17) for i in range(30)}  # 17 is 0 again
    return shown | {"/late.png": late, "/never.png": never}


@pytest.fixture
def scheduled(tmp_path: Path) -> Iterator[Scheduled]:
    """Four nightly increments; /late.png comes in the third, /never.png in none."""
    with small_web(routes()) as site:
        flow.write_recipe(tmp_path / "recipe.yaml", nightly(tmp_path))
        told = Scheduled(tmp_path, site, tmp_path / "workspace")
        told.add(["/late.png", "/never.png", "/gone.png"])
        for batch in BATCHES:
            told.add([f"/{i}.png" for i in batch])
            told.run()
        yield told


def by_uid(store: Store, kind: str) -> dict[str, dict[str, Any]]:
    """Every row of every table of a kind by its folder and uid."""
    found: dict[str, dict[str, Any]] = {}
    for ref in list_shards(store, kind):
        folder = "/".join(ref.folder.split("/")[:2])
        rows = {row["uid"]: row for row in store.read_table(ref.table).to_pylist()}
        assert not found.get(folder, {}).keys() & rows.keys(), f"twice in {folder}"
        found.setdefault(folder, {}).update(rows)
    return found


def test_thin(scheduled: Scheduled) -> None:
    space = scheduled.workspace
    before = by_uid(space.store, "scores")
    print(space.increments("web"))
    told = compact(space, None, None, False)
    print(told)
    told = compact(space, None, 100, False)
    print(told)
    assert by_uid(space.store, "scores") == before
    print(space.store.files(""))
    v = verify(space)
    print(v)
    assert v.ok
