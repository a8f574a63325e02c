"""A whole run in small: drawn pairs on a loopback server and in a trusted folder, and a recipe that takes seconds.

Among the web pairs is one of each kind that must not come through: a missing image, a broken one, a small one, a copy,
one of a single word, and texts that try to get into a report as markup or into a terminal as commands.
"""

import contextlib
import csv
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml

from pipelines import stages
from pipelines.cli import main
from pipelines.console import Console
from pipelines.run import Run, open_run
from tests.pipelines.small_web import ALLOW, SmallWeb, small_web

SCRIPT = "<script>alert(1)</script> a red box"
IMAGE = '"><img src=x onerror=alert(2)> a blue box'
TERMINAL = "a green box \x1b]0;owned\x07\x1b[2J [bold]of[/bold] lines"
COLOURS = {"red": (40, 30, 210), "green": (40, 170, 40), "blue": (210, 60, 30), "yellow": (30, 210, 230)}
PLACES = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75)}
WEB, TRUSTED = 48, 40
TOWER = {"layers": 1, "width": 32, "heads": 2}
MODEL = {"embed_dim": 16, "image_px": 32, "patch_px": 8, "vision": TOWER, "text": TOWER, "context": 16}
TRAIN = {"model": MODEL, "workers": 1, "batch_pairs": 16, "max_patches": 16, "warmup_steps": 1, "precision": "fp32"}
BLIP: dict[str, Any] = {"image_px": 32, "patch_px": 8, "vision": TOWER, "text": TOWER, "embed_dim": 16}
BLIP |= {"vocabulary": 120, "word_steps": 3, "caption_steps": 3, "match_steps": 3, "batch_pairs": 8}
BLIP |= {"precision": "fp32"}


def drawing(i: int, side_px: int = 64) -> bytes:
    """A PNG of a coloured box; every `i` is another picture."""
    chance = np.random.default_rng(i)
    image = np.full((side_px, side_px + side_px // 4 * (i % 3), 3), chance.integers(90, 230), np.uint8)
    height, width = image.shape[:2]
    colour, (x, y) = list(COLOURS.values())[i % 4], list(PLACES.values())[i // 4 % 4]
    radius = side_px // 8 + i % 5
    centre = int(x * width) + int(chance.integers(-4, 5)), int(y * height) + int(chance.integers(-4, 5))
    cv2.rectangle(image, (centre[0] - radius, centre[1] - radius), (centre[0] + radius, centre[1] + radius), colour, -1)
    return bytes(cv2.imencode(".png", image)[1].tobytes())


def caption(i: int) -> str:
    return f"a {list(COLOURS)[i % 4]} box at the {list(PLACES)[i // 4 % 4]}"


def draw_folder(folder: Path, count: int, first: int = 0) -> None:
    """`count` pictures with their captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        (folder / f"{i:04d}.png").write_bytes(drawing(i))
        (folder / f"{i:04d}.txt").write_text(caption(i))


def routes() -> dict[str, Any]:
    """What the web shows: ordinary pictures, then the others."""
    shown: dict[str, Any] = {f"/{i}.png": drawing(1000 + i) for i in range(WEB)}
    others = {"/copy.png": drawing(1003), "/small.png": drawing(7, 12), "/broken.png": b"\x89PNG no more than this"}
    others |= {"/word.png": drawing(2001), "/script.png": drawing(2002), "/image.png": drawing(2003)}
    return shown | others | {"/terminal.png": drawing(2004)}


TEXTS = {"/copy.png": "a copy of a box", "/small.png": "a small box", "/broken.png": "no box at all"}
TEXTS |= {"/word.png": "box", "/script.png": SCRIPT, "/image.png": IMAGE, "/terminal.png": TERMINAL}
TEXTS |= {"/missing.png": "a box that is not there"}


def write_table(path: Path, site: SmallWeb, names: list[str]) -> None:
    """The `urls` table: each address with its text and its page."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["url", "text", "page"])
        for name in names:
            words = TEXTS.get(name) or caption(1000 + int(name[1:-4]))
            out.writerow([site.url(name), words, site.url("/index.html")])


def recipe(root: Path) -> dict[str, Any]:
    """The recipe as plain values; `root` holds web.csv, trusted/ and eval/."""
    return {
        "name": "tiny",
        "sources": {
            "web": {"kind": "urls", "path": f"{root}/web.csv", "allow": ALLOW}
            | {"columns": {"url": "url", "text": "text", "page": "page"}},
            "trusted": {"kind": "folder", "path": f"{root}/trusted", "trusted": True},
        },
        "fetch": {"side_px": 64, "shard_pairs": 30, "attempts": 1, "deadline_s": 10},
        "filters": {
            "image_stats": {},
            "text_stats": {},
            "image_hash": {},
            "clip": {"weights": "previous"},
            "blip_caption": {"weights": "previous"},
            "blip_match": {"weights": "previous"},
        },
        "reducers": {"exact_duplicates": {}},
        "keep": [
            {"column": "image_stats.shorter_side_px", "min": 24},
            {"column": "text_stats.words", "min": 2},
            {"column": "clip.cosine", "top_fraction": 0.8},
            {"one_per": "exact_duplicates.group"},
        ],
        "texts": {"from": ["texts", "blip_caption.texts"], "match": "blip_match.probability", "min": 0.01},
        "canaries": {"per_defect": 4, "max_fraction": 0.5},
        "first_filter": {"clip": TRAIN | {"steps": 4}, "blip": BLIP},
        "pretrain": TRAIN | {"steps": 6},
        "evaluate": {"zero_shot": {"path": f"{root}/eval", "templates": ["a {} box"]}},
        "rounds": 1,
        "engine": "inline",
    }


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@contextlib.contextmanager
def drawn(root: Path) -> Iterator[SmallWeb]:
    """Writes trusted/, eval/, web.csv and recipe.yaml below `root`, and serves the web while the block lasts."""
    draw_folder(root / "trusted", TRUSTED)
    for n, colour in enumerate(COLOURS):
        draw_folder(root / "eval" / colour, 1, 3000 + n)
    with small_web(routes()) as site:
        write_table(root / "web.csv", site, [*(f"/{i}.png" for i in range(WEB)), *TEXTS])
        write_recipe(root / "recipe.yaml", recipe(root))
        yield site


def run_stages(path: Path, workspace: Path, **options: Any) -> tuple[Run, dict[str, Any]]:
    """The flow's stages in its order, without Prefect; returns the run and the report's summary."""
    run = open_run(path, workspace=str(workspace), console=Console(quiet=True), **options)
    stages.check(run.recipe)
    with run.workspace.lock(), contextlib.closing(run):
        stages.crawl(run)
        stages.fetch(run)
        scorer = stages.first_filter(run)
        for number in range(1, stages.rounds(run) + 1):
            picked = stages.curate(run, number, scorer)
            stages.gates(run, number, picked)
            record = stages.pretrain(run, number, picked)
            models = stages.finetune(run, number, picked, record)
            stages.evaluate(run, number, stages.served(run, number, record, models))
            scorer = stages.promote(run, number, scorer, models)
        told = stages.report(run)
    return run, told


def copied(workspace: Path, target: Path) -> Path:
    """A copy of a finished workspace that a test may change."""
    return Path(shutil.copytree(workspace, target))


def files_below(workspace: Path, *kinds: str) -> dict[str, tuple[int, int]]:
    """(size, time of change in ns) of each file of these kinds, by relative path."""
    found = (path for kind in kinds for path in (workspace / kind).rglob("*") if path.is_file())
    return {str(p.relative_to(workspace)): (p.stat().st_size, p.stat().st_mtime_ns) for p in found}


@dataclass(frozen=True)
class Told:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Told:
    """The command line in this process, from `main` on."""
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["pairmill", *arguments]
    capsys.readouterr()
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return Told(code, *capsys.readouterr())


def site(url: str) -> dict[str, Any]:
    """A source that crawls a loopback site."""
    return {"kind": "site", "seeds": [url], "allow": ALLOW, "delay_s": 0}
