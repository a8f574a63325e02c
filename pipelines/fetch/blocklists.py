"""Blocklists of the fetch: hosts, original bytes and pictures that must never be asked for or written.

A file has one entry a line; `#` begins a comment. `hosts`: a name, which covers its subdomains. `sha256`: 64 hex
digits, of the original bytes. `perceptual`: 16 hex digits, the 64-bit pHash as `image_hash.phash` has it; an image
whose hash differs in at most `radius` bits is blocked. Comparing one with a list of 100,000 takes about 0.3 ms.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from yarl import URL

from pairs.errors import PairmillError
from pairs.recipe import BlockSpec
from pairs.workspace import Dead
from pipelines.fetch.client import Permit
from pipelines.fetch.failures import Failure
from pipelines.sources import forgotten

HOST = re.compile(r"[^\s/:@]+|\[[0-9a-f:.]+\]")


@dataclass(frozen=True)
class Blocklists:
    """`hashes` is a vector of N uint64."""

    hosts: frozenset[str]
    sha256: frozenset[bytes] = frozenset()
    hashes: np.ndarray = field(default_factory=lambda: np.array([], np.uint64))
    radius: int = 0

    def host(self, host: str) -> Failure | None:
        """Whether `host` or a domain above it is listed."""
        labels = host.lower().rstrip(".").split(".")
        above = (".".join(labels[start:]) for start in range(len(labels)))
        return Failure("refused", "block_host") if self.hosts and not self.hosts.isdisjoint(above) else None

    def bytes(self, sha256: str) -> Failure | None:
        return Failure("refused", "block_sha256") if bytes.fromhex(sha256) in self.sha256 else None

    def picture(self, phash: str | None) -> Failure | None:
        """A blank image has no hash, and can't be found by one."""
        if phash is None or not len(self.hashes):
            return None
        distance = np.bitwise_count(self.hashes ^ np.uint64(int(phash, 16)))
        return Failure("refused", "block_hash") if distance.min() <= self.radius else None

    def bar(self, dead: Dead) -> Permit:
        """Refuses hosts that are listed and addresses that are forgotten; for `Robots`."""

        async def barred(url: URL) -> Failure | None:
            return Failure("refused", "forgotten") if forgotten(dead, str(url)) else self.host(url.host or "")

        return barred


def load_blocklists(spec: BlockSpec) -> Blocklists:
    """Reads the files; raises PairmillError for one that can't be read and for a line of another form."""
    hosts = _lines(spec.hosts, "hosts", lambda line: HOST.fullmatch(line) is not None, "a host name")
    known = _lines(spec.sha256, "sha256", _hex(64), "64 hex digits")
    hashes = _lines(spec.perceptual, "perceptual", _hex(16), "16 hex digits")
    return Blocklists(
        frozenset(host.strip("[]").rstrip(".") for host in hosts),
        frozenset(map(bytes.fromhex, known)),
        np.array([int(line, 16) for line in hashes], np.uint64),
        spec.radius,
    )


def _hex(digits: int) -> Callable[[str], bool]:
    form = re.compile(rf"[0-9a-f]{{{digits}}}")
    return lambda line: form.fullmatch(line) is not None


def _lines(path: str | None, name: str, fits: Callable[[str], bool], form: str) -> list[str]:
    if path is None:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PairmillError(
            expected=f"a text file at fetch.block.{name}", found=str(error), remedy="correct the path"
        ) from None
    found = []
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.partition("#")[0].strip().lower()
        if line and not fits(line):
            raise PairmillError(expected=f"{form} at {path}:{number}", found=repr(raw[:80]), remedy="correct this line")
        found += [line] if line else []
    return found
