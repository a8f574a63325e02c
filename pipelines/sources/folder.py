"""`folder`: images on local disk, each with its captions in `<stem>.txt` beside it, one a line, or in COCO's JSON.

Links are never followed and nothing outside the folder is read: neither when it is listed nor, later, when a
candidate is read by its relative path.
"""

import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairs.errors import PairmillError
from pairs.identity import local_key
from pipelines.sources import Context, Outside, Row, text

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
CAPTION_BYTES = 1 << 20
COCO_BYTES = 1 << 30


@dataclass
class Coco:
    """What COCO's files say of an image."""

    id: str | None = None
    license: str | None = None
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """`path` is the folder; `license` is noted for every image. `captions` names COCO's caption files, a path or
    pattern below the folder; an image is known in them by its file name."""

    path: str
    license: str | None = None
    captions: str | None = None

    def candidates(self, context: Context) -> Iterator[Row]:
        root = Path(self.path)
        if not root.is_dir():
            raise PairmillError(
                expected=f"a folder at sources.{context.name}.path",
                found=f"{self.path!r}, which is none",
                remedy="correct the path; a relative one starts at the current folder",
            )
        coco = self._coco(root, context.name) if self.captions else {}
        for relative in _images(root, context):
            known = coco.get(relative.rpartition("/")[2], Coco())
            yield {
                "url_key": local_key(context.name, relative),
                "url": f"{context.name}:{relative}",
                "texts": [text(line, "caption") for line in [*known.captions, *self._captions(root, relative)]],
                "found": "file",
                "license": known.license or self.license,
                "source_uid": known.id,
            }

    def _captions(self, root: Path, relative: str) -> list[str]:
        caption = str(Path(relative).with_suffix(".txt"))
        if not os.path.lexists(root / caption):
            return []
        return self.read(caption, CAPTION_BYTES).decode("utf-8", "replace").splitlines()

    def _coco(self, root: Path, name: str) -> dict[str, "Coco"]:
        """What the caption files say, by file name of the image."""
        assert self.captions
        found: dict[str, Coco] = {}
        files = [] if Path(self.captions).is_absolute() else sorted(root.glob(self.captions))
        for path in files:
            try:
                _read_coco(json.loads(self.read(path.relative_to(root).as_posix(), COCO_BYTES)), found)
            except (ValueError, LookupError, TypeError, Outside) as error:
                raise PairmillError(
                    expected=f"COCO's captions (images, annotations) in {path}",
                    found=f"{type(error).__name__}: {error}"[:200],
                    remedy=f"mend it, or let sources.{name}.captions name other files",
                ) from None
        if not found:
            raise PairmillError(
                expected=f"caption files at sources.{name}.captions, below {self.path}",
                found=f"none of {self.captions!r}" if not files else "files that name no image",
                remedy="name them such as annotations/captions_*.json",
            )
        return found

    def read(self, relative_path: str, max_bytes: int) -> bytes:
        """At most `max_bytes` + 1 bytes of a plain file inside the folder; raises Outside, or OSError."""
        root = Path(self.path).resolve()
        path = root / relative_path
        if not path.is_relative_to(root) or path.resolve() != path:
            raise Outside(relative_path)
        with open(path, "rb", opener=_open_plain) as file:
            return file.read(max_bytes + 1)


def _read_coco(data: Any, found: dict[str, Coco]) -> None:
    """Adds a file's images and captions to `found`; captions stand in order of their ids."""
    licences = {entry["id"]: entry.get("url") or entry.get("name") for entry in data.get("licenses", [])}
    images = {}
    for entry in data["images"]:
        known = found.setdefault(str(entry["file_name"]).rpartition("/")[2], Coco())
        known.id, known.license = str(entry["id"]), licences.get(entry.get("license"))
        images[entry["id"]] = known
    for entry in sorted(data["annotations"], key=lambda entry: int(entry["id"])):
        images[entry["image_id"]].captions.append(str(entry["caption"]))


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
