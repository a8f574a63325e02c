"""Fingerprints: finished work is keyed by content and configuration, never by worker or position.

A fingerprint is 12 hex digits of a sha256 over canonical JSON (sorted keys, no spaces). Weights and
other inputs enter by the hash of their content, so that a name can't hide a change.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path

from pairs.errors import PairmillError

LENGTH = 12


def fingerprint(parts: Mapping[str, object]) -> str:
    """12 hex digits over `parts`, which must be JSON (floats by their shortest repr)."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    return hashlib.sha256(canonical.encode()).hexdigest()[:LENGTH]


def _plain(value: object) -> object:
    if isinstance(value, tuple | set | frozenset):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot enter a fingerprint: {value!r}")


def content_hash(path: Path, only: Collection[str] = ()) -> str:
    """sha256 over a file's bytes, or over the sorted relative names and hashes of a folder's files (`only` these).

    A link counts as the file it leads to (a model hub's cache is made of links). What can't be hashed is an
    error, never an empty hash: a link to a folder or to nothing, and a path where nothing is.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise PairmillError(expected=f"a file or a folder at {path}", found="neither", remedy="check this path")
    items = ((item.relative_to(path).as_posix(), item) for item in sorted(path.rglob("*")))
    lines = [f"{name}\0{content_hash(item)}" for name, item in items if (not only or name in only) and _leaf(item)]
    return hashlib.sha256("\0".join(lines).encode()).hexdigest()


def _leaf(item: Path) -> bool:
    if item.is_symlink() and not item.is_file():
        raise PairmillError(
            expected=f"files, folders and links to files in {item.parent}",
            found=f"{item.name}, a link to {item.readlink()}",
            remedy="copy what it leads to into its place",
        )
    return not item.is_dir()
