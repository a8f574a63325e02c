"""`webdataset`: images and texts of tars that exist already, such as img2dataset's or our own shards.

A pair is what has one key: an image, its texts in `.txt` (one a line) and `.json` (`caption`, `text` or `alt`, or the
`texts` of our own shards), which may also name `url`, `page`, `license` and `uid`. With an http `url` it is known by
that, so that a takedown finds it; its bytes come from the tar all the same. The uid, or else the key, is its
`source_uid`. Tars are read by the strict reader of `pairs/tar.py`: one with a link, a device, a bad key or a cut end is
refused whole. Of each the headers are read once, then the texts, while seeking over images; it is kept where these
lie, about 300 bytes each. So a fetch reads a range for each image, whatever the tar's size.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from pairs.errors import PairmillError
from pairs.identity import local_key, url_key
from pairs.store import file_system
from pairs.tar import Member, read_members
from pipelines.merge import bad_address
from pipelines.sources import HTTP, Context, Outside, Row, text
from pipelines.sources.archive_files import paths

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
FACTS = {"page": ("page",), "license": ("license",), "source_uid": ("source_uid", "uid")}
WORDS = ("caption", "text", "alt")
MAX_TEXT_BYTES = 16 << 20


class Place(NamedTuple):
    """Where an image lies: bytes of the tar at an address."""

    tar: str
    offset: int
    size: int


class Pair(NamedTuple):
    """What has one key: its texts and facts, its image's path `<tar>/<key>.<ext>` (None without one) and place."""

    key: str
    lines: list[str]
    facts: dict[str, Any]
    path: str | None
    place: Place

    @property
    def url(self) -> str | None:
        """The http address that it names, if it does."""
        url = self.facts.get("url")
        return url if isinstance(url, str) and bad_address(url) is None else None


@dataclass(frozen=True)
class Source:
    """`path` is a tar, a pattern or a list of them, local or at any fsspec address; their names must differ. `_tar` has
    the places of images by their paths and the keys of their addresses, and None for each tar that was read."""

    path: str | list[str]
    _tar: dict[str, Place | None] = field(default_factory=dict, init=False, repr=False)

    def candidates(self, context: Context) -> Iterator[Row]:
        for name, address in self._tars(f"sources.{context.name}").items():
            for pair in self._read(name, address):
                if pair.path is None:
                    context.dropped["no_image"] += 1
                else:
                    yield _row(context.name, pair.path, pair)

    def read(self, relative_path: str, max_bytes: int) -> bytes:
        """At most `max_bytes` + 1 bytes of the image `<tar>/<key>.<ext>`, or of that with this http address; raises
        Outside where no tar of ours has it."""
        http = relative_path.lower().startswith(HTTP)
        key = url_key(relative_path) if http else relative_path
        if key not in self._tar:
            for name, address in self._tars("sources").items():
                if name not in self._tar and key not in self._tar and (http or name == key.rpartition("/")[0]):
                    for _ in self._read(name, address):
                        pass
        place = self._tar.get(key)
        if place is None:
            raise Outside(relative_path)
        fs, path = file_system(place.tar)
        end = place.offset + min(place.size, max_bytes + 1)
        return bytes(fs.cat_file(path, start=place.offset, end=end))

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

    def _read(self, name: str, address: str) -> Iterator[Pair]:
        """The pairs of a tar, which is checked whole before; where they lie is remembered."""
        fs, path = file_system(address)
        parts: dict[str, dict[str, Member]] = {}
        with fs.open(path, "rb") as file:
            for member in read_members(file, name):
                parts.setdefault(member.key, {})[member.ext.lower()] = member
            for key, members in parts.items():
                pair = _pair(name, address, key, members, file)
                if pair.path is not None:
                    self._tar[pair.path] = pair.place
                    if pair.url:
                        self._tar.setdefault(url_key(pair.url), pair.place)
                yield pair
        self._tar[name] = None


def _pair(name: str, address: str, key: str, members: dict[str, Member], file: IO[bytes]) -> Pair:
    def content(ext: str) -> bytes:
        member = members.get(ext, Member(key, ext, 0, 0))
        if member.size > MAX_TEXT_BYTES:
            raise PairmillError(
                expected=f"texts of at most 16 MiB in {name}", found=f"{key}.{ext}", remedy="leave out this pair"
            )
        file.seek(member.offset)
        return file.read(member.size)

    lines = content("txt").decode("utf-8", "replace").splitlines()
    image = next((member for ext, member in members.items() if ext in IMAGES), None)
    place = Place(address, image.offset, image.size) if image else Place(address, 0, 0)
    return Pair(key, lines, _facts(content("json")), image and f"{name}/{key}.{image.ext}", place)


def _row(source: str, relative: str, pair: Pair) -> Row:
    facts = pair.facts
    told = {field: next((str(facts[n]) for n in names if facts.get(n)), None) for field, names in FACTS.items()}
    known = {"url_key": local_key(source, relative), "url": f"{source}:{relative}"}
    row = {"url": pair.url} if pair.url else known
    return row | told | {"texts": _texts(pair), "found": "tar", "source_uid": told["source_uid"] or pair.key}


def _texts(pair: Pair) -> list[dict[str, str | None]]:
    """The texts with their kinds and languages, as our own shards have them, or else those of the pair's files."""
    told = pair.facts.get("texts")
    own = [t for t in told if isinstance(t, dict) and isinstance(t.get("text"), str)] if isinstance(told, list) else []
    if own:
        return [text(t["text"], str(t.get("kind") or "caption"), str(t.get("language") or "")) for t in own]
    named = [pair.facts[name] for name in WORDS if isinstance(pair.facts.get(name), str)]
    return [text(words, "caption") for words in dict.fromkeys([*pair.lines, *named])]


def _facts(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
