"""A crawl of real documentation, served by nginx on loopback, against an independent extraction of the same pages.

    apt-get download gimp-help-en python-skimage-doc povray-doc && for f in *.deb; do dpkg -x $f docs; done
    python benchmarks/live_crawl.py FOLDER gimp=docs/usr/share/gimp/2.0/help/en skimage=docs/usr/share/doc/… [--pages N]

Each NAME=DIR becomes http://127.0.0.1:PORT/NAME/. The pages that the server's log says were had are read from disk by
the other extractor (`extraction.py`). A pair is (image address, kind of text, text without white space), each once,
since candidates are merged by address. Prints recall, precision, disagreements, and what became of the pages.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from extraction import page_pairs
from nginx_web import nginx

from pairs.identity import canonical_url

PORT = 8796
Pair = tuple[str, str, str]


def recipe(folder: Path, names: list[str], pages: int) -> Path:
    seeds = [f"http://127.0.0.1:{PORT}/{name}/" for name in names]
    site = {"kind": "site", "seeds": seeds, "allow": ["127.0.0.0/8"], "delay_s": 0, "per_host": 8, "max_pages": pages}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "docs", "sources": {"docs": site}, "engine": "inline"}))
    return path


def served(folder: Path, log: Path) -> dict[str, Path]:
    """The HTML pages that were had, by address."""
    pages = {}
    for line in log.read_text().splitlines():
        _, uri, status = line.split(" ", 1)[0], *line.split(" ", 1)[1].rsplit(" ", 1)
        path = folder / "www" / uri.lstrip("/")
        if status == "200" and re.search(r"\.x?html?$", uri):
            pages[f"http://127.0.0.1:{PORT}{uri.removesuffix('index.html') if not path.exists() else uri}"] = path
    return pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("docs", nargs="+", help="NAME=DIR")
    parser.add_argument("--pages", type=int, default=3000)
    given = parser.parse_args()
    folder = given.folder.resolve()
    (folder / "www").mkdir(parents=True)
    (folder / "www" / "00000.jpg").write_bytes(b"")
    names = [entry.partition("=")[0] for entry in given.docs]
    for entry in given.docs:
        name, _, place = entry.partition("=")
        (folder / "www" / name).symlink_to(Path(place).resolve())
    command = [str(Path(sys.executable).parent / "pairmill"), "crawl", str(recipe(folder, names, given.pages))]
    with nginx(folder, PORT) as log:
        subprocess.run([*command, "--workspace", str(folder / "space")], check=True)
        pages = served(folder, log)
    table = pq.ParquetFile(next((folder / "space/candidates").rglob("*.parquet")))
    counts = json.loads(table.schema_arrow.metadata[b"counts"])
    found = {(canonical_url(row["url"]), t["kind"], "".join(t["text"].split()))
             for row in table.read().to_pylist() for t in row["texts"]}  # fmt: skip
    expected: set[Pair] = set()
    for address, path in pages.items():
        for _, url, kind, words in page_pairs(address, path.read_bytes()):
            if url.startswith("http"):
                expected.add((canonical_url(url), kind, words))
    both = len(found & expected)
    print(json.dumps({"pages": counts["pages"], "images": counts["new"], "dropped": counts["dropped"]}))
    print(json.dumps({"found": len(found), "expected": len(expected), "recall": both / max(len(expected), 1),
                      "precision": both / max(len(found), 1)}))  # fmt: skip
    for name, more in (("only ours", found - expected), ("only theirs", expected - found)):
        print(name, len(more), Counter(kind for _, kind, _ in more))
        for pair in sorted(more)[:8]:
            print("   ", *(part[:100] for part in pair), sep=" | ")


if __name__ == "__main__":
    main()
