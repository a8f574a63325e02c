"""The rules of `keep` in a recipe, and which texts a kept pair keeps: the settings that a selection is made from."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pairs.fingerprint import LENGTH, content_hash
from pairs.strict import Spec

FITTED = ("top_fraction", "quantile", "target_recall")
TESTS = ("min", "max", "between", "equals", "among", "in_list", *FITTED, "is_null")
Share = Annotated[float, Field(ge=0, le=1)]


def _list_hash(path: str) -> str:
    """The content hash of a file of uids, which may be large: taken once as long as the file stays as it is."""
    facts = Path(path).stat() if Path(path).exists() else None
    return _hashed(path, facts.st_mtime_ns if facts else 0, facts.st_size if facts else 0)


@functools.cache
def _hashed(path: str, mtime_ns: int, size: int) -> str:
    return content_hash(Path(path))


class Condition(Spec):
    """What a column's value must be to stay. `between` is min and max; the others of `FITTED` become a threshold that
    the selection finds once and pins: over all rows (`top_fraction`, `quantile`) or over canaries (`target_recall`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
    min: float | None = None
    max: float | None = None
    between: tuple[float, float] | None = None
    equals: str | float | bool | None = None
    among: list[str | float] | None = Field(None, alias="in")
    in_list: str | None = None  # a file of uids in DataComp's format
    top_fraction: float | None = Field(None, gt=0, le=1)
    quantile: tuple[Share, Share] | None = None  # what lies between these two stays
    target_recall: float | None = Field(None, gt=0, le=1)  # the share of a defect's fitting canaries that is dropped
    defect: str | None = None
    drop: Literal["below", "above"] | None = None  # on which side `target_recall` drops; below
    is_null: bool | None = None

    @property
    def given(self) -> list[str]:
        """The tests that are stated."""
        return [name for name in TESTS if getattr(self, name) is not None]

    @property
    def fitted(self) -> bool:
        """Whether a threshold has to be found first."""
        return any(getattr(self, name) is not None for name in FITTED)

    @property
    def told(self) -> str:
        """The tests in words. A list is named by its content: another path to the same uids is the same rule."""
        tests = self.model_dump(exclude_none=True, include={*TESTS, "defect", "drop"})
        if self.in_list is not None:
            tests["in_list"] = _list_hash(self.in_list)[:LENGTH]
        return " ".join(f"{name} {list(v) if isinstance(v, tuple) else v}" for name, v in tests.items())

    @property
    def identity(self) -> dict[str, Any]:
        """What it is in a fingerprint: a list counts by its content, not by its path."""
        told = self.model_dump(exclude_none=True, exclude={"sources"})
        return told | ({"in_list": _list_hash(self.in_list)} if self.in_list is not None else {})

    @model_validator(mode="after")
    def _fits(self) -> "Condition":
        for name in FITTED:
            if getattr(self, name) is not None and len(self.given) > 1:
                raise ValueError(f"`{name}` stands alone: write another rule for the rest")
        if self.between is not None and (self.min is not None or self.max is not None):
            raise ValueError("`between` is min and max: give one or the other")
        for pair in (self.between, self.quantile):
            if pair is not None and pair[0] > pair[1]:
                raise ValueError(f"{list(pair)} ends before it begins")
        if (self.target_recall is None) != (self.defect is None):
            raise ValueError("`target_recall` and `defect` go together: whose canaries the threshold must drop")
        if self.drop is not None and self.target_recall is None:
            raise ValueError("`drop` belongs to `target_recall`")
        return self


class Rule(Condition):
    """One line of `keep`. A list column is judged by `over`: any, all or first of its values. `sources` states another
    condition for some sources; `off` there means that the rule doesn't judge them."""

    column: str | None = None
    over: Literal["any", "all", "first"] = "first"
    sources: dict[str, Condition | Literal[False]] | None = None
    one_per: str | None = None
    best: str | None = None
    quarantine: Literal[True] | None = None  # what the rule drops is never shown; null keeps older fingerprints

    @model_validator(mode="after")
    def _quarantine_has_a_column(self) -> "Rule":
        if self.quarantine and self.column is None:
            raise ValueError("`quarantine` belongs to a rule with a `column`")
        return self

    @model_validator(mode="after")
    def _one_shape(self) -> "Rule":
        if self.one_per is not None:
            if self.column is not None or self.given or self.sources is not None:
                raise ValueError("`one_per` stands alone, with `best`")
        elif self.best is not None:
            raise ValueError("`best` belongs to `one_per`")
        elif self.column is None or not self.given:
            raise ValueError(f"a rule names a `column` and one of {', '.join(TESTS).replace('among', 'in')}")
        for source, other in (self.sources or {}).items():
            if other and not other.given:
                raise ValueError(f"`sources.{source}` states no test: give one, or `off`")
        return self

    @property
    def name(self) -> str:
        """How the funnel and the reports call this rule."""
        if self.one_per is not None:
            return f"one_per {self.one_per}" + (f" best {self.best}" if self.best else "")
        over = "" if self.over == "first" else f"{self.over} "
        others = "; ".join(f"{name}: {c.told if c else 'off'}" for name, c in (self.sources or {}).items())
        return f"{over}{self.column} {self.told}" + (f" ({others})" if others else "")

    @property
    def identity(self) -> dict[str, Any]:
        others = {name: condition and condition.identity for name, condition in (self.sources or {}).items()}
        return super().identity | ({"sources": others} if others else {})

    def cases(self) -> dict[str, "Rule | None"]:
        """The rule without overrides (under ""), and as it judges each source that has one; None where it is off."""
        fields = {*TESTS, "defect", "drop"}
        cases: dict[str, Rule | None] = {}
        for source, condition in {"": self, **(self.sources or {})}.items() if self.column is not None else ():
            tests = condition.model_dump(exclude_none=True, include=fields) if condition else {}
            cases[source] = Rule(column=self.column, over=self.over, **tests) if condition else None
        return cases


class TextsSpec(Spec):
    """Which texts a kept pair keeps (CapFilt). `from` lists the columns, in the order `match` scored them."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    sources: list[str] = Field(["texts"], alias="from")
    match: str | None = None
    min: float = 0.5
    keep: Literal["all", "first", "best", "both"] = "all"
    false_drops: Share | None = None  # of the fitting twins' own texts: finds the threshold, no less than `min`

    @property
    def name(self) -> str:
        """How manifest and report call the threshold that takes the place of `min`."""
        return f"texts false_drops {self.false_drops}" + f", min {self.min}" * (self.min > 0)

    def at(self, thresholds: Mapping[str, Mapping[str, Any]]) -> "TextsSpec":
        """With the number that was found for `false_drops`, where it stands in these `thresholds`, as `min`."""
        found = thresholds.get(self.name)
        return self if found is None else self.model_copy(update={"min": found["value"]})

    @model_validator(mode="before")
    @classmethod
    def _no_floor_unless_given(cls, given: Any) -> Any:
        """A default that tells itself from the same number given: what a spec says is known by its values."""
        alone = isinstance(given, dict) and given.get("false_drops") is not None and "min" not in given
        return given | {"min": 0.0} if alone else given

    @model_validator(mode="after")
    def _false_drops_of_own_texts(self) -> "TextsSpec":
        if self.false_drops is not None and (self.match is None or self.sources[:1] != ["texts"]):
            raise ValueError("`false_drops` looks at own texts: give `match`, and `from` that begins with texts")
        return self
