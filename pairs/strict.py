"""Strict settings: a mapping becomes a frozen type, and what doesn't fit becomes advice.

Used for recipes and, with the same messages, for the settings of each source, filter and reducer.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pairs.errors import PairmillError

T = TypeVar("T")


class Spec(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def strict(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """`cls` (a pydantic model or a dataclass) from `data`; unknown keys name the nearest right one."""
    try:
        if dataclasses.is_dataclass(cls):
            unknown = [str(key) for key in data if key not in setting_names(cls)]
            if unknown:
                raise _unknown(f"{where}.{unknown[0]}", unknown[0], setting_names(cls))
            return TypeAdapter(cls).validate_python(dict(data))
        return cls.model_validate({str(key): value for key, value in data.items()})  # type: ignore[attr-defined, no-any-return]
    except ValidationError as error:
        raise _advice(cls, error, where) from None


def setting_names(cls: Any) -> list[str]:
    """The keys that `cls` takes."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls) if field.init]
    return [field.alias or name for name, field in cls.model_fields.items()]


def nearest(name: str, choices: list[str]) -> str:
    """A hint for a misspelt `name`."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"use one of: {', '.join(sorted(choices))}"


def _unknown(path: str, key: str, choices: list[str]) -> PairmillError:
    return PairmillError(
        expected=f"a known key at {path.rpartition('.')[0]}", found=f"{key!r}", remedy=nearest(key, choices)
    )


def _advice(cls: Any, error: ValidationError, where: str) -> PairmillError:
    extras = ("extra_forbidden", "unexpected_keyword_argument")
    first = min(error.errors(), key=lambda e: e["type"] not in extras)  # a misspelt key explains a missing one
    path = ".".join([where, *(str(part) for part in first["loc"])])
    if first["type"] in extras:
        holder = _descend(cls, first["loc"][:-1])
        return _unknown(path, str(first["loc"][-1]), setting_names(holder) if holder else [])
    return PairmillError(
        expected=f"{path}: {first['msg']}", found=repr(first["input"])[:200], remedy="correct this value in the recipe"
    )


def _descend(cls: Any, loc: tuple[int | str, ...]) -> Any:
    """The model that holds the key at `loc`, or None where the path can't be followed."""
    for part in loc:
        if isinstance(part, str) and isinstance(cls, type) and issubclass(cls, BaseModel):
            cls = _model_in(cls.model_fields[part].annotation) if part in cls.model_fields else cls
    return cls if isinstance(cls, type) and issubclass(cls, BaseModel) else None


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation
    return next((m for m in map(_model_in, typing.get_args(annotation)) if m and issubclass(m, BaseModel)), None)
