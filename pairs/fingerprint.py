"""Fingerprints: finished work is keyed by content and configuration, never by worker or position.

A fingerprint is 12 hex digits of a sha256 over canonical JSON (sorted keys, no spaces). Weights and
other inputs enter by the hash of their content, so that a name can't hide a change.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

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


def content_hash(path: Path) -> str:
    """sha256 over a file's bytes, or over the sorted relative names and hashes of a folder's files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = [
        f"{item.relative_to(path).as_posix()} {content_hash(item)}"
        for item in sorted(path.rglob("*"))
        if item.is_file() and not item.is_symlink()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
