"""`folder`: images on local disk, each with its captions in `<stem>.txt` beside it, one a line.

Links are never followed and nothing outside the folder is read: neither when it is listed nor, later, when a
candidate is read by its relative path.
"""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pairs.errors import PairmillError
from pairs.identity import local_key
from pipelines.sources import Context, Row, text

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
CAPTION_BYTES = 1 << 20


class Outside(Exception):
    """A path that leaves the folder, or is a link, or no plain file."""


@dataclass(frozen=True)
class Source:
    """`path` is the folder; `license` is noted for every image."""

    path: str
    license: str | None = None

    def candidates(self, context: Context) -> Iterator[Row]:
        root = Path(self.path)
        if not root.is_dir():
            raise PairmillError(
                expected=f"a folder at sources.{context.name}.path",
                found=f"{self.path!r}, which is none",
                remedy="correct the path; a relative one starts at the current folder",
            )
        for relative in _images(root, context):
            yield {
                "url_key": local_key(context.name, relative),
                "url": f"{context.name}:{relative}",
                "texts": [text(line, "caption") for line in self._captions(root, relative)],
                "found": "file",
                "license": self.license,
            }

    def _captions(self, root: Path, relative: str) -> list[str]:
        caption = str(Path(relative).with_suffix(".txt"))
        if not os.path.lexists(root / caption):
            return []
        return self.read(caption, CAPTION_BYTES).decode("utf-8", "replace").splitlines()

    def read(self, relative_path: str, max_bytes: int) -> bytes:
        """At most `max_bytes` + 1 bytes of a plain file inside the folder; raises Outside, or OSError."""
        root = Path(self.path).resolve()
        path = root / relative_path
        if not path.is_relative_to(root) or path.resolve() != path:
            raise Outside(relative_path)
        with open(path, "rb", opener=_open_plain) as file:
            return file.read(max_bytes + 1)


def _open_plain(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Outside(path)
    return handle


def _images(root: Path, context: Context) -> Iterator[str]:
    """Sorted relative paths of the image files; links are counted and left out."""
    for folder, folders, files in os.walk(root, followlinks=False):
        folders.sort()
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix.lower() not in IMAGES:
                continue
            if path.is_symlink() or path.with_suffix(".txt").is_symlink():
                context.dropped["link"] += 1
                continue
            relative = path.relative_to(root).as_posix()
            if not relative.isprintable():  # a name that isn't UTF-8, or has control characters
                context.dropped["bad_name"] += 1
                continue
            yield relative
