"""`webdataset`: images and texts of tars that exist already, such as img2dataset's or our own shards.

A pair is what has one key: an image, its texts in `.txt` (one a line) and `.json` (`caption`, `text` or `alt`), which
may also name its `url`, `page`, `license` and `uid`. The uid, or else the key, stays in `source_uid`. Tars are read
by the strict reader of `pairs/tar.py`: one with a link, a device, a bad key or a cut end is refused whole.
A tar is held in memory while it is read, and the last one while its images are fetched.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pairs.errors import PairmillError
from pairs.identity import local_key
from pairs.store import file_system
from pairs.tar import Member, read_members
from pipelines.sources import Context, Outside, Row, text
from pipelines.sources.archive_files import paths

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
FACTS = {"page": ("page",), "license": ("license",), "source_uid": ("source_uid", "uid")}
WORDS = ("caption", "text", "alt")
MAX_TAR_BYTES = 16 << 30


@dataclass(frozen=True)
class Source:
    """`path` is a tar, a pattern or a list of them, local or at any fsspec address; their names must differ."""

    path: str | list[str]
    _tar: dict[str, tuple[bytes, dict[str, Member]]] = field(default_factory=dict, init=False, repr=False)

    def candidates(self, context: Context) -> Iterator[Row]:
        for name in self._tars(f"sources.{context.name}"):
            data, members = self._open(name)
            pairs: dict[str, dict[str, Member]] = {}
            for member in members.values():
                pairs.setdefault(member.key, {})[member.ext.lower()] = member
            for key, parts in pairs.items():
                image = next((member for ext, member in parts.items() if ext in IMAGES), None)
                if image is None:
                    context.dropped["no_image"] += 1
                else:
                    yield _row(context.name, f"{name}/{key}.{image.ext}", key, parts, data)

    def read(self, relative_path: str, max_bytes: int) -> bytes:
        """At most `max_bytes` + 1 bytes of `<tar>/<key>.<ext>`; raises Outside where no tar of ours has it."""
        name, _, inside = relative_path.rpartition("/")
        if name not in self._tars("sources"):
            raise Outside(relative_path)
        data, members = self._open(name)
        if inside not in members:
            raise Outside(relative_path)
        member = members[inside]
        return data[member.offset : member.offset + min(member.size, max_bytes + 1)]

    def _tars(self, where: str) -> dict[str, str]:
        """Addresses of the tars by their names."""
        found: dict[str, str] = {}
        for path in paths(self.path, where, "a tar"):
            name = path.rpartition("/")[2]
            if name in found:
                raise PairmillError(
                    expected=f"tars of different names at {where}.path",
                    found=f"{found[name]} and {path}",
                    remedy="name them apart, or make them two sources",
                )
            found[name] = path
        return found

    def _open(self, name: str) -> tuple[bytes, dict[str, Member]]:
        """A tar's bytes and its members by name; the one that was read last is kept."""
        if name not in self._tar:
            fs, path = file_system(self._tars("sources")[name])
            if fs.size(path) > MAX_TAR_BYTES:
                raise PairmillError(
                    expected=f"a tar of at most 16 GiB: {name}", found="a larger one", remedy="split it"
                )
            data = bytes(fs.cat_file(path))
            members = {f"{member.key}.{member.ext}": member for member in read_members(data, name)}
            self._tar.clear()
            self._tar[name] = data, members
        return self._tar[name]


def _row(source: str, relative: str, key: str, parts: dict[str, Member], data: bytes) -> Row:
    def content(ext: str) -> bytes:
        member = parts.get(ext)
        return data[member.offset : member.offset + member.size] if member else b""

    facts = _facts(content("json"))
    lines = content("txt").decode("utf-8", "replace").splitlines()
    named = [facts[name] for name in WORDS if isinstance(facts.get(name), str)]
    told = {field: next((str(facts[n]) for n in names if facts.get(n)), None) for field, names in FACTS.items()}
    row = {
        "url_key": local_key(source, relative),
        "url": f"{source}:{relative}",
        "texts": [text(words, "caption") for words in dict.fromkeys([*lines, *named])],
        "found": "tar",
    }
    return row | told | {"source_uid": told["source_uid"] or key}


def _facts(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
