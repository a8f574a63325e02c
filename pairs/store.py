"""Where shards and tables lie: a local folder or any fsspec URL. A write lands whole or not at all.

On local disk a write goes to a temporary name in the same folder, is fsynced and renamed; on an object
store the put is atomic by itself. Existence is therefore completion, and "resume" is `has`.
"""

import contextlib
import errno
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pairs.errors import PairmillError
from pairs.increments import hides, read_mark

TEMPORARY = ".tmp-"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Store:
    """Files below one root. Paths are relative, with forward slashes."""

    def __init__(self, root: str | Path) -> None:
        # workers write beside us: a cached listing of a bucket would not show it
        self.fs, base = file_system(str(root))
        self._base = base.rstrip("/")
        self.local = Path(base) if isinstance(self.fs, fsspec.implementations.local.LocalFileSystem) else None
        self.root = base if self.local else str(root)  # absolute, so that a worker in another folder finds it

    def __reduce__(self) -> tuple[object, ...]:
        return Store, (self.root,)

    def full(self, path: str) -> str:
        if path.startswith("/") or ".." in path.split("/"):
            raise PairmillError(
                expected="a path inside the workspace", found=path, remedy="remove '..' and leading slashes"
            )
        return f"{self._base}/{path}" if path else self._base

    def has(self, path: str) -> bool:
        return bool(self.fs.isfile(self.full(path)))

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        """The file's bytes, or the `size` bytes from `start` (one range request)."""
        if start == 0 and size is None:
            return bytes(self.fs.cat_file(self.full(path)))
        return bytes(self.fs.cat_file(self.full(path), start=start, end=None if size is None else start + size))

    def size(self, path: str) -> int:
        return int(self.fs.size(self.full(path)))

    def write(self, path: str, data: bytes | str) -> None:
        with self.writing(path) as file:
            file.write(data.encode() if isinstance(data, str) else data)

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[io.BufferedWriter]:
        """A binary file that becomes `path` when the block ends without an error."""
        target = self.full(path)
        folder = Path(target).parent if self.local else None
        with advice(target):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                self._publish(name, target)
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)

    def _publish(self, temporary: str, target: str) -> None:
        if self.local:
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
            directory = os.open(os.path.dirname(target), os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        else:
            self.fs.put_file(temporary, target)

    def files(self, prefix: str, suffix: str = "") -> list[str]:
        """Sorted relative paths of the files below `prefix`; unfinished ones, and increments that a merge hides, are
        left out."""
        return self._shown(lambda: self.every(prefix, suffix), str)

    def _shown(self, listing: Callable[[], list[str]], path: Callable[[str], str]) -> list[str]:
        """What readers see of a listing; listed again where a merge moved on meanwhile."""
        before = read_mark(self)
        while True:
            names, after = listing(), read_mark(self)
            if before == after:
                gone = hides(after)
                return [name for name in names if not gone(path(name))]
            before = after

    def every(self, prefix: str, suffix: str = "") -> list[str]:
        """As `files`, with what a merge hides."""
        found = self.fs.find(self.full(prefix)) if self.fs.exists(self.full(prefix)) else []
        names = (name.removeprefix(self._base).lstrip("/") for name in found)
        return sorted(n for n in names if n.endswith(suffix) and TEMPORARY not in n)

    def folders(self, prefix: str) -> list[str]:
        """Sorted names of the folders directly below `prefix`; increments that a merge hides are left out."""
        return self._shown(lambda: self._folders(prefix), lambda name: f"{prefix}/{name}/")

    def _folders(self, prefix: str) -> list[str]:
        if not self.fs.isdir(self.full(prefix)):
            return []
        entries = self.fs.ls(self.full(prefix), detail=True)
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")

    def delete(self, path: str, recursive: bool = False) -> None:
        if self.fs.exists(self.full(path)):
            self.fs.rm(self.full(path), recursive=recursive)

    def sweep(self) -> int:
        """Removes what killed writers left behind; called by whoever holds the lock. Returns the count."""
        if not self.local:
            return 0
        left = list(self.local.rglob(f"{TEMPORARY}*"))
        for path in left:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        return len(left)

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        data = pa.BufferReader(self.read(path))  # no Python file: Arrow's threads would call it, even while Python ends
        try:
            table = pq.read_table(data, columns=columns, page_checksum_verification=True)
            data.seek(0)
            rows = pq.read_metadata(data).num_rows
            if table.num_rows != rows and table.num_columns:  # a damaged page can end a column early
                raise pa.ArrowInvalid(f"{table.num_rows} rows where its footer says {rows}")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        return table

    def tables(self, path: str, rows: int, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """A table in pieces of `rows` rows, the last of which may be shorter; a row group at a time is in memory."""
        try:
            with self._reader(path) as reader:
                left = reader.metadata.num_rows
                for batch in reader.iter_batches(rows, columns=columns, use_threads=False):
                    yield pa.Table.from_batches([batch])
                    left -= batch.num_rows
                if left:
                    raise pa.ArrowInvalid(f"{left} rows less than its footer says")
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error

    def rows(self, path: str) -> int:
        """How many rows the footer of a table tells."""
        try:
            with self._reader(path) as reader:
                return int(reader.metadata.num_rows)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(path, error) from error

    @contextlib.contextmanager
    def _reader(self, path: str) -> Iterator[pq.ParquetFile]:
        with self.fs.open(self.full(path)) as file, pq.ParquetFile(file, page_checksum_verification=True) as reader:
            yield reader

    def write_table(self, path: str, table: pa.Table, metadata: dict[str, str] | None = None) -> None:
        """Writes Parquet with reproducible bytes; `metadata` goes into the schema's key-value pairs."""
        if metadata is not None:
            table = table.replace_schema_metadata(metadata)
        with self.writing(path) as file:
            pq.write_table(table, file, compression="zstd", store_schema=True, write_page_checksum=True)


def _damaged(path: str, error: Exception) -> PairmillError:
    return PairmillError(
        expected=f"a Parquet table at {path}", found=str(error), remedy="run `pairmill verify` on the workspace"
    )


def table_metadata(table: pa.Table) -> dict[str, str]:
    """The key-value pairs that `write_table` stored."""
    return {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}


def file_system(address: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or an fsspec URL, and the path in it."""
    try:
        return fsspec.core.url_to_fs(address, use_listings_cache=False)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:  # a protocol without its package, or none at all
        raise PairmillError(
            expected=f"an address that can be opened: {address}",
            found=" ".join(str(error).split()),
            remedy="install that package beside pairmill, or name a local folder",
        ) from None


@contextlib.contextmanager
def advice(target: str) -> Iterator[None]:
    """Tells a full disk and a missing permission inside the block as PairmillError; other errors keep their name."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise no_space(target) from error
        if error.errno in FORBIDDEN:
            raise PairmillError(
                expected=f"permission to use {error.filename or target}",
                found=str(error.strerror).lower(),
                remedy="mend the owner or the mode of this folder, or choose another --workspace",
            ) from error
        raise


def no_space(target: str) -> PairmillError:
    """What to tell the user when a disk is full."""
    return PairmillError(
        expected=f"room to write {target}",
        found="no space left on the device; nothing was published",
        remedy="free some space, then run the same command again: it goes on where it stopped",
    )
