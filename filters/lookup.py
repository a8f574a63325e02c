"""Filters and reducers are found by their module's name: `text_stats` is class `TextStats` in `filters/text_stats.py`.

There is no registry and no list to edit. The names are read off the sources without importing them, because
importing every model library to print a name would take seconds.
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from filters.base import Filter, Measurement, Reducer
from pairs.errors import PairmillError
from pairs.strict import nearest, strict

FOLDER = Path(__file__).parent

M = TypeVar("M", bound=Measurement)


def class_name(name: str) -> str:
    """`text_stats` → `TextStats`."""
    return "".join(part.capitalize() for part in name.split("_"))


def load_filter(name: str, settings: Mapping[str, Any]) -> Filter:
    """The filter of that name with its settings checked."""
    return _load(Filter, name, settings)  # type: ignore[type-abstract]


def load_reducer(name: str, settings: Mapping[str, Any]) -> Reducer:
    """The reducer of that name with its settings checked."""
    return _load(Reducer, name, settings)  # type: ignore[type-abstract]


def names(kind: type[Measurement]) -> list[str]:
    """Every filter, or every reducer, there is, sorted."""

    def holds(path: Path) -> bool:
        pattern = rf"^class {class_name(path.stem)}\([^)]*\b{kind.__name__}\b"
        return re.search(pattern, path.read_text(), re.MULTILINE) is not None

    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "base" and holds(path))


def _load(kind: type[M], name: str, settings: Mapping[str, Any]) -> M:
    word = kind.__name__.lower()
    if name not in names(kind):
        raise PairmillError(
            expected=f"a {word} that exists: a module filters/{name}.py with a class {class_name(name)}",
            found=f"no {word} named {name!r}",
            remedy=nearest(name, names(kind)),
        )
    cls = getattr(importlib.import_module(f"filters.{name}"), class_name(name))
    return strict(cls, settings, f"{word}s.{name}")
