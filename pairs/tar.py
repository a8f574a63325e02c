"""WebDataset tars with reproducible bytes, and a reader that believes nothing.

Written as USTAR with mtime 0, owner 0 and fixed modes: the same members give the same bytes. Members of
a pair are adjacent. The reader refuses links, devices, bad keys, interleaved pairs and a tar that was cut, also
one cut at a member's boundary, which tarfile and webdataset take for a clean end. Of a file it reads the headers alone
and seeks over what lies between; a header that says it is longer than 1 MiB is damage.
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
HEAD_BYTES = 1 << 20
EMPTY = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)  # a header without a name, of size 0
EMPTY_SUM = int(EMPTY[148:154], 8)


class Member(NamedTuple):
    """A file of a tar: `key` + "." + `ext`, and where its data lies."""

    key: str
    ext: str
    offset: int
    size: int


class TarWriter:
    """Writes members one after another; `close` ends the archive and leaves `size` and `sha256`."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
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
        offset = self.size + BLOCK
        self._write(_header(f"{key}.{ext}".encode(), len(data)) + data + bytes(-len(data) % BLOCK))
        return Member(key, ext, offset, len(data))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

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
        self._write(bytes(-(self.size + 2 * BLOCK) % tarfile.RECORDSIZE + 2 * BLOCK))
        self.sha256 = self._hash.hexdigest()


def _header(name: bytes, size: int) -> bytes:
    """The block that tarfile makes of a TarInfo with this name and size, and all else as it is by default, in a tenth
    of its time. The checksum is that of the empty header plus what the name and the digits of the size add."""
    digits = b"%011o" % size
    assert len(name) < 100 and len(digits) == 11, "the name or the size of a member outgrew its field"
    total = EMPTY_SUM + sum(name) + sum(digits) - 11 * ord("0")
    return b"%b%b%b%b%06o\0 %b" % (name, EMPTY[len(name) : 124], digits, EMPTY[135:148], total, EMPTY[156:])


class _Heads:
    """What tarfile may read of a file: headers, none of which is large, whatever it says."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.tell, self.seek = file, file.tell, file.seek

    def read(self, size: int) -> bytes:
        if size > HEAD_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def read_members(tar: bytes | IO[bytes], name: str) -> list[Member]:
    """The members of a whole tar, bytes or a file that can seek, in order, checked. `name` goes into the error
    message."""
    members = list(_scan(io.BytesIO(tar) if isinstance(tar, bytes) else tar, name))
    seen: dict[str, set[str]] = {}
    for member in members:
        extensions = seen.setdefault(member.key, set())
        if member.key != next(reversed(seen)):
            raise _bad(name, f"members of {member.key} that are not adjacent")
        if member.ext in extensions:
            raise _bad(name, f"{member.key}.{member.ext} twice")
        extensions.add(member.ext)
    return members


def _scan(file: IO[bytes], name: str) -> Iterator[Member]:
    end, size = 0, file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with tarfile.open(fileobj=_Heads(file), mode="r:") as tar:  # type: ignore[call-overload]
            while info := tar.next():
                tar.members.clear()  # it would remember each
                if info.type not in PLAIN or info.issparse():
                    raise _bad(name, f"{info.name!r}, which is a link, a folder, a device or sparse")
                key, _, ext = info.name.partition(".")
                if not KEY.fullmatch(key) or not EXTENSION.fullmatch(ext):
                    raise _bad(name, f"a member named {info.name!r}")
                end = info.offset_data + -(-info.size // BLOCK) * BLOCK
                if info.size < 0 or end > size:
                    raise _bad(name, f"an end inside {info.name!r}")
                yield Member(key, ext, info.offset_data, info.size)
    except PairmillError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError) as error:  # sizes that don't fit raise the latter two
        raise _bad(name, f"{error} after byte {end}") from error
    file.seek(end)
    if file.read(2 * BLOCK) != bytes(2 * BLOCK):
        raise _bad(name, f"no end mark after byte {end} of {size}: the tar was cut")
    while rest := file.read(HEAD_BYTES):
        if any(rest):
            raise _bad(name, f"more data behind the end mark at byte {end}")


def _bad(name: str, found: str) -> PairmillError:
    return PairmillError(
        expected=f"a whole WebDataset tar of plain files in {name}",
        found=found,
        remedy="delete this tar and its table, then run the same command again; it is made anew",
    )
