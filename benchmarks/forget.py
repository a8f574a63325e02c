"""`forget` while a curation runs: does either break, and is anything left of the pairs in any byte of the workspace?

    python benchmarks/forget.py FOLDER [--pairs 5000] [--shards 20] [--forget 500] [--engine ray]

Draws pictures, each with a text that no other has, and serves them on loopback; `pairmill fetch`, then `pairmill
curate`, and once it has scored some shards, `forget` on uids spread over all shards. Afterwards: `curate` once more,
`verify`, and a search for each address and text: all strings of Parquet files, cells of databases, all other bytes.
"""

import argparse
import contextlib
import csv
import functools
import http.server
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pairs.shard import list_shards
from pairs.verify import verify
from pairs.workspace import Workspace
from pipelines.takedown import forget

RECIPE: dict[str, Any] = {
    "name": "forget",
    "filters": {"image_stats": {}, "text_stats": {}, "image_hash": {}, "language": {}},
    "reducers": {"exact_duplicates": {}, "near_duplicates": {}},
    "keep": [{"column": "text_stats.words", "min": 2}, {"one_per": "exact_duplicates.group"}],
    "gates": {},
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """Serves a folder on a free port of 127.0.0.1."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()


def draw(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8)
        cv2.imwrite(str(folder / f"{i:06d}-picture.png"), cv2.resize(pixels, (160, 120), interpolation=cv2.INTER_CUBIC))


def write_recipe(folder: Path, port: int, count: int, shards: int) -> Path:
    with (folder / "web.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["url", "text"])
        for i in range(count):
            out.writerow(
                [f"http://127.0.0.1:{port}/{i:06d}-picture.png", f"squares of colour, the drawing of turn {i:06d}"]
            )
    columns = {"url": "url", "text": "text"}
    web = {"kind": "urls", "path": str(folder / "web.csv"), "columns": columns}
    web |= {"allow": ["127.0.0.0/8"]}
    recipe = RECIPE | {"sources": {"web": web}, "fetch": {"side_px": 128, "shard_pairs": -(-count // shards)}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def pairmill(*arguments: str) -> "subprocess.Popen[bytes]":
    code = "from pipelines.cli import main; main()"
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(process: "subprocess.Popen[bytes]") -> None:
    error = process.communicate()[1].decode(errors="replace")
    assert process.returncode == 0, error[-3000:]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from strings(item)


def content(path: Path) -> str:
    """All that a file says, decompressed; raw bytes stand one character each, with UTF-8 read too."""
    if path.suffix == ".parquet":
        columns = [c for c in pq.read_table(path).columns if not pa.types.is_primitive(c.type)]
        floats = (pa.list_(pa.float32()), pa.list_(pa.float16()))
        cells = [text for c in columns if c.type not in floats for text in strings(c.to_pylist())]
        facts = {key: value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
        return "\0".join([*cells, *facts.values(), *strings(list(json.loads(facts.get(b"errors", "{}"))))])
    raw = path.read_bytes()
    told = raw.decode("latin-1") + "\0" + raw.decode("utf-8", "replace")
    if raw.startswith(b"SQLite format 3"):
        with contextlib.closing(sqlite3.connect(path)) as base:
            names = [name for (name,) in base.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            told += "\0".join(str(row) for name in names for row in base.execute(f'SELECT * FROM "{name}"'))
    return told


def leaks(space: Path, needles: list[str]) -> dict[str, int]:
    """How many of the needles stand in which file."""
    found = {}
    files = sorted((p for p in space.rglob("*") if p.is_file()), key=lambda p: (p.suffix == ".db", p))
    for path in files:  # databases last: whoever closes one takes its log away
        text = content(path)
        if count := sum(needle in text for needle in needles):
            found[str(path.relative_to(space))] = count
    return found


def chosen(space: Workspace, count: int) -> list[dict[str, Any]]:
    """Rows of `count` pairs, from all shards in turn."""
    names = ["uid", "url", "text"]
    tables = [space.store.read_table(ref.table, names).to_pylist() for ref in list_shards(space.store, "pairs")]
    turns = [row for rows in zip(*(t[: -(-count // len(tables))] for t in tables), strict=True) for row in rows]
    return turns[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--forget", type=int, default=500)
    parser.add_argument("--engine", default="ray")
    given = parser.parse_args()
    root, folder = given.folder.resolve() / "space", given.folder.resolve()
    draw(folder / "www", given.pairs)
    with served(folder / "www") as port:
        recipe = write_recipe(folder, port, given.pairs, given.shards)
        options = [str(recipe), "--workspace", str(root), "--engine", given.engine]
        ended(pairmill("fetch", *options))
        space = Workspace.open(root)
        rows = chosen(space, given.forget)
        needles = [row[name] for row in rows for name in ("url", "text")]
        shards = len(list_shards(space.store, "pairs"))
        curation = pairmill("curate", *options)
        while len(scored := list(root.glob("scores/*/*/*/*.parquet"))) < shards // 2:  # some are made, some are not
            assert curation.poll() is None, "the curation was over before it was seen"
            time.sleep(0.01)
        began, waited = time.monotonic(), []
        facts = forget(space, {"uids": [row["uid"] for row in rows]}, "asked for", waited.append)
        took_s = time.monotonic() - began
        ended(curation)
        ended(pairmill("curate", *options))
    left, verdict = leaks(root, needles), verify(space)
    report = json.loads(next(root.glob("runs/*/report.json")).read_text())
    funnel = {row["step"]: row["left"] for row in report["rounds"][0]["funnel"]}
    told = {"pairs": given.pairs, "shards": shards, "forgotten": given.forget, "tables_scored_before": len(scored)}
    told |= {
        "waited_for_the_curation": bool(waited),
        "seconds_with_waiting": round(took_s, 1),
        "rewritten": facts["rewritten"],
        "searched": len(needles),
    }
    told |= {"files": sum(p.is_file() for p in root.rglob("*")), "left": left, "problems": verdict.problems}
    print(json.dumps(told | {"funnel": funnel, "adds_up": report["rounds"][0]["adds_up"]}, indent=1))
    sys.exit(bool(left or verdict.problems or not waited or not report["rounds"][0]["adds_up"]))


if __name__ == "__main__":
    main()
