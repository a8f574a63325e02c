"""Filters and reducers are found by their module's name: `text_stats` is class `TextStats` in `filters/text_stats.py`.

There is no registry and no list to edit. The names are read off the sources without importing them, because
importing every model library to print a name would take seconds. A recipe that wants one twice, such as two `probe`s,
gives each a name of its own and says its `kind`.
"""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from filters.base import Filter, Measurement, Reducer, class_name
from pairs.errors import PairmillError
from pairs.strict import nearest, strict

FOLDER = Path(__file__).parent
OWN_NAME = r"[a-z][a-z0-9_]{0,39}"  # it becomes a folder, and the first half of its columns' names

M = TypeVar("M", bound=Measurement)


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
    module = str(settings.get("kind", name))
    if module not in names(kind):
        raise PairmillError(
            expected=f"a {word} that exists: a module filters/{module}.py with a class {class_name(module)}",
            found=f"no {word} named {module!r}",
            remedy=nearest(module, names(kind)),
        )
    taken = ["pairs", *names(Filter), *names(Reducer)]
    if module != name and (name in taken or not re.fullmatch(OWN_NAME, name)):
        raise PairmillError(
            expected=f"a name of its own for a {word} of kind {module}: small letters, digits and '_'",
            found=f"{name!r}" + (", which is another's" if name in taken else ""),
            remedy=f"call it {module}_2, or by what it looks for",
        )
    cls = getattr(importlib.import_module(f"filters.{module}"), class_name(module))
    return strict(cls, {key: value for key, value in settings.items() if key != "kind"}, f"{word}s.{name}")
