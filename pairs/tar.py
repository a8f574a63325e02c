"""WebDataset tars with reproducible bytes, and a reader that believes nothing.

Written as USTAR with mtime 0, owner 0 and fixed modes: the same members give the same bytes. Members of
a pair are adjacent. The reader refuses links, devices, bad keys, interleaved pairs and a tar that was cut, also
one cut at a member's boundary, which tarfile and webdataset take for a clean end.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

from pairs.errors import PairmillError

KEY = re.compile(r"[0-9A-Za-z_-]{1,80}")
BLOCK = 512


class Member(NamedTuple):
    """A file of a tar: `key` + "." + `ext`, and where its data lies."""

    key: str
    ext: str
    offset: int
    size: int


class _Counting(io.RawIOBase):
    """Passes writes on, hashing and counting them."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        self.file.write(view)
        self.sha256.update(view)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size


class TarWriter:
    """Writes members one after another; `close` ends the archive and leaves `size` and `sha256`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._out = _Counting(file)
        self._tar = tarfile.open(fileobj=self._out, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[call-overload]  # noqa: SIM115
        self.size, self.sha256 = 0, ""

    def add(self, key: str, ext: str, data: bytes) -> Member:
        if not KEY.fullmatch(key):
            raise PairmillError(
                expected="a key of 1 to 80 letters, digits, '-' or '_'", found=repr(key), remedy="use the pair's uid"
            )
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // BLOCK) * BLOCK
        return Member(key, ext, self._out.size - padded, len(data))

    def close(self) -> None:
        self._tar.close()
        self.size, self.sha256 = self._out.size, self._out.sha256.hexdigest()


def read_members(data: bytes, name: str) -> list[Member]:
    """The members of a whole tar in order, checked. `name` goes into the error message."""
    members = list(_scan(data, name))
    seen: set[str] = set()
    for before, member in zip([None, *members], members, strict=False):
        if before is None or before.key != member.key:
            if member.key in seen:
                raise _bad(name, f"members of {member.key} that are not adjacent")
            seen.add(member.key)
    return members


def _scan(data: bytes, name: str) -> Iterator[Member]:
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                if not info.isreg():
                    raise _bad(name, f"{info.name!r}, which is a link, a folder or a device")
                key, _, ext = info.name.partition(".")
                if not KEY.fullmatch(key) or not ext or "/" in ext:
                    raise _bad(name, f"a member named {info.name!r}")
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                if end > len(data):
                    raise _bad(name, f"an end inside {info.name!r}")
                yield Member(key, ext, info.offset_data, info.size)
    except tarfile.TarError as error:
        raise _bad(name, f"{error} after byte {end}") from error
    if len(data) - end < 2 * BLOCK or any(data[end : end + 2 * BLOCK]):
        raise _bad(name, f"no end mark after byte {end} of {len(data)}: the tar was cut")


def group(members: Iterable[Member]) -> dict[str, dict[str, Member]]:
    """Members by key, then by extension."""
    pairs: dict[str, dict[str, Member]] = {}
    for member in members:
        pairs.setdefault(member.key, {})[member.ext] = member
    return pairs


def _bad(name: str, found: str) -> PairmillError:
    return PairmillError(
        expected=f"a whole WebDataset tar of plain files in {name}",
        found=found,
        remedy="delete this tar and its table, then run the same command again; it is made anew",
    )
