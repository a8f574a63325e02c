"""WebDataset tars with reproducible bytes, and a reader that believes nothing.

Written as USTAR with mtime 0, owner 0 and fixed modes: the same members give the same bytes. Members of
a pair are adjacent. The reader refuses links, devices, bad keys, interleaved pairs and a tar that was cut, also
one cut at a member's boundary, which tarfile and webdataset take for a clean end.
"""

import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from typing import IO, NamedTuple

from pairs.errors import PairmillError

KEY = re.compile(r"[0-9A-Za-z_-]{1,80}")
EXTENSION = re.compile(r"[0-9A-Za-z_][0-9A-Za-z_.-]{0,15}")
PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
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
        self._written: dict[str, set[str]] = {}  # extensions by key, the last key being the open one

    def add(self, key: str, ext: str, data: bytes) -> Member:
        if not KEY.fullmatch(key):
            raise PairmillError(
                expected="a key of 1 to 80 letters, digits, '-' or '_'", found=repr(key), remedy="use the pair's uid"
            )
        if not EXTENSION.fullmatch(ext):
            raise PairmillError(
                expected="an extension of 1 to 16 letters, digits, '.', '-' or '_'",
                found=repr(ext),
                remedy="shorten it",
            )
        self._take(key, ext)
        info = tarfile.TarInfo(f"{key}.{ext}")
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // BLOCK) * BLOCK
        return Member(key, ext, self._out.size - padded, len(data))

    def _take(self, key: str, ext: str) -> None:
        extensions = self._written.setdefault(key, set())
        if ext in extensions or key != next(reversed(self._written)):
            raise PairmillError(
                expected="each member once, and a pair's members side by side",
                found=f"{key}.{ext} again, or after another pair",
                remedy="leave out the second pair of this uid",
            )
        extensions.add(ext)

    def close(self) -> None:
        self._tar.close()
        self.size, self.sha256 = self._out.size, self._out.sha256.hexdigest()


def read_members(data: bytes, name: str) -> list[Member]:
    """The members of a whole tar in order, checked. `name` goes into the error message."""
    members = list(_scan(data, name))
    seen: dict[str, set[str]] = {}
    for member in members:
        extensions = seen.setdefault(member.key, set())
        if member.key != next(reversed(seen)):
            raise _bad(name, f"members of {member.key} that are not adjacent")
        if member.ext in extensions:
            raise _bad(name, f"{member.key}.{member.ext} twice")
        extensions.add(member.ext)
    return members


def _scan(data: bytes, name: str) -> Iterator[Member]:
    end = 0
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                if info.type not in PLAIN or info.issparse():
                    raise _bad(name, f"{info.name!r}, which is a link, a folder, a device or sparse")
                key, _, ext = info.name.partition(".")
                if not KEY.fullmatch(key) or not EXTENSION.fullmatch(ext):
                    raise _bad(name, f"a member named {info.name!r}")
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                if info.size < 0 or end > len(data):
                    raise _bad(name, f"an end inside {info.name!r}")
                yield Member(key, ext, info.offset_data, info.size)
    except PairmillError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError) as error:  # sizes that don't fit raise the latter two
        raise _bad(name, f"{error} after byte {end}") from error
    if len(data) - end < 2 * BLOCK or any(data[end : end + 2 * BLOCK]):
        raise _bad(name, f"no end mark after byte {end} of {len(data)}: the tar was cut")
    if data[end:].strip(b"\0"):
        raise _bad(name, f"more data behind the end mark at byte {end}")


def _bad(name: str, found: str) -> PairmillError:
    return PairmillError(
        expected=f"a whole WebDataset tar of plain files in {name}",
        found=found,
        remedy="delete this tar and its table, then run the same command again; it is made anew",
    )
