"""Images on an nginx of the benchmark's own, on a loopback port, with a log of what was asked for.

Photographs of 640×480 are drawn: some unique ones, of which the others are hard links, so that 50,000 take a few MB.
"""

import contextlib
import io
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pairs.identity import url_key
from pairs.process import child
from pairs.schemas import CANDIDATES
from pairs.workspace import Workspace
from pipelines.candidates import part

UNIQUE = 100
NGINX = "/usr/sbin/nginx"
CONFIG = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/error.log;
{user}events {{ worker_connections 2048; }}
http {{
  log_format asked '$msec $uri $status'; access_log {folder}/access.log asked;
  types {{ text/html html htm; image/jpeg jpg; image/png png; }} sendfile on; keepalive_requests 100000;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{ listen 127.0.0.1:{port}; root {folder}/www; }}
}}
"""


def draw(folder: Path, count: int) -> None:
    """`folder/www/00000.jpg` and on, `count` of them."""
    www = folder / "www"
    www.mkdir(parents=True, exist_ok=True)
    for n in range(count):
        path = www / f"{n:05d}.jpg"
        if path.exists():
            continue
        if n < UNIQUE:
            path.write_bytes(photo(n))
        else:
            os.link(www / f"{n % UNIQUE:05d}.jpg", path)


def photo(seed: int) -> bytes:
    """A JPEG of 640×480 with the spectrum of a photograph: about 60 kB."""
    chance = np.random.default_rng(seed)
    coarse = Image.fromarray(chance.integers(0, 255, (12, 16, 3), np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + chance.normal(0, 12, (480, 640, 1)).astype(np.int16)
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
    return out.getvalue()


@contextlib.contextmanager
def nginx(folder: Path, port: int) -> Iterator[Path]:
    """Serves `folder/www` while the block lasts; yields the access log."""
    folder = folder.resolve()
    user = "user root; " if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(CONFIG.format(folder=folder, port=port, user=user))
    log = folder / "access.log"
    log.unlink(missing_ok=True)
    with child([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")]):
        for _ in range(100):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/00000.jpg"):
                break
            time.sleep(0.1)
        yield log


def asked(log: Path, start: int = 0) -> list[tuple[float, str]]:
    """Time (seconds since 1970) and path of every image asked for, from byte `start` of the log on."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode().splitlines()
    return [(float(at), uri) for at, uri, _ in map(str.split, lines) if re.fullmatch(r"/\d+\.jpg", uri)]


def write_candidates(folder: Path, port: int, count: int) -> Workspace:
    """A workspace with one increment of the source `web`."""
    workspace = Workspace.open(folder, create=True)
    urls = [f"http://127.0.0.1:{port}/{n:05d}.jpg" for n in range(count)]
    text = {"kind": "alt", "language": None}
    rows = [{"url_key": url_key(u), "url": u, "texts": [text | {"text": f"picture {u[-9:-4]}"}]} for u in urls]
    table = pa.Table.from_pylist(sorted(rows, key=lambda row: str(row["url_key"])), schema=CANDIDATES)
    workspace.store.write_table(part("web", "0000"), table)
    return workspace
