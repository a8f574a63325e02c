"""Where candidates come from. A source kind is a module of this folder, found by its name; no list to edit.

It holds a frozen dataclass `Source`, whose fields are its settings, with `candidates(context)` yielding rows of
`pairs.schemas.CANDIDATES` (url, texts, page, found, …; `url_key` is added for those with an http URL). A source of
local images also has `read(relative_path, max_bytes)`, and its rows name `<source>:<relative path>`, or an http address
that `read` takes in place of the path.
"""

import importlib
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.compute import Engine
from pairs.errors import PairmillError
from pairs.identity import url_key
from pairs.recipe import FetchSpec, SourceSpec
from pairs.strict import nearest, strict
from pairs.workspace import Dead, Workspace, refused

Progress = Callable[[int, int, str], None]
Row = dict[str, Any]
HTTP = ("http://", "https://")


@dataclass(frozen=True)
class Context:
    """What a source is run with. `dropped` counts by reason what it leaves out, `pages` what came of each page."""

    workspace: Workspace
    name: str
    increment: str
    allow: tuple[str, ...]
    fetch: FetchSpec
    progress: Progress
    engine: Engine = "inline"
    workers: int = 1
    dropped: Counter[str] = field(default_factory=Counter)
    pages: Counter[str] = field(default_factory=Counter)


class Outside(Exception):
    """A path that leaves a local source, or is a link, or no plain file."""


class Source(Protocol):
    def candidates(self, context: Context) -> Iterator[Row]: ...


class LocalSource(Source, Protocol):
    def read(self, relative_path: str, max_bytes: int) -> bytes: ...


def load_source(name: str, spec: SourceSpec) -> Source:
    """The source of a recipe's entry `name`, its settings checked."""
    kinds = [module.name for module in pkgutil.iter_modules(__path__) if "_" not in module.name]
    if spec.kind not in kinds:
        raise PairmillError(
            expected=f"a known kind at sources.{name}.kind", found=repr(spec.kind), remedy=nearest(spec.kind, kinds)
        )
    module = importlib.import_module(f"{__name__}.{spec.kind}")
    return strict(module.Source, spec.settings, f"sources.{name}")  # type: ignore[no-any-return]


def forgotten(dead: Dead, url: str) -> bool:
    """Whether tombstones mean an http address."""
    return any(dead.values()) and refused(dead, url_key(url), url)


def text(value: str, kind: str, language: str | None = None) -> dict[str, str | None]:
    """An entry of `texts`."""
    return {"text": value, "kind": kind, "language": language or None}
