"""`pairmill new-filter NAME`: a filter that measures something, and the test that says what its numbers mean.

Both work as they are written, so that there is something to change instead of something to finish; docs/add-a-filter.md
shows the file and goes on from there.
"""

import keyword
import re
from pathlib import Path

from filters.base import class_name
from pairs.errors import PairmillError
from pairs.process import ROOT

TAKEN = {"Any", "Batch", "Filter", "Mapping", "Pairs"}  # names in the file, and the prefix of the pairs' own fields
FILTER = '''"""How bright the image is: the mean of its levels. About 0.1 ms for 256×256 pixels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from filters.base import Batch, Filter


@dataclass(frozen=True)
class CLASS(Filter):
    """`value`: 0 for black, 1 for white."""

    needs = ("pixels",)
    columns = {"value": pa.float32()}

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        return {"value": [None if image is None else measure(image) for image in batch.pixels]}


def measure(image: np.ndarray) -> float:
    """The mean level of an HxWx3 uint8 RGB image, in [0, 1]."""
    return float(image.mean()) / 255
'''
TEST = '''"""What `NAME` says about an image."""

import numpy as np
import pytest

from filters.NAME import measure


def test_black_is_0_and_white_is_1() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    assert measure(image) == 0
    image[:, 15:] = 255
    assert measure(image) == pytest.approx(0.5)
    assert measure(image[:, 15:]) == 1
'''


def write_filter(name: str, root: Path = ROOT) -> list[Path]:
    """Writes `filters/<name>.py` and its test below `root`, and returns their paths. Nothing is overwritten."""
    _check_name(name)
    paths = [root / "filters" / f"{name}.py", root / "tests" / "filters" / f"test_{name}.py"]
    for path in paths:
        if path.exists() or not path.parent.is_dir():
            raise PairmillError(
                expected=f"a place for a new file {path}",
                found="the file is there already" if path.exists() else f"no folder {path.parent}",
                remedy="choose another name" if path.exists() else "call this in a checkout of pairmill",
            )
    for path, text in zip(paths, (FILTER, TEST), strict=True):
        path.write_text(text.replace("NAME", name).replace("CLASS", class_name(name)), encoding="utf-8")
    return paths


def _check_name(name: str) -> None:
    usual = re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) and len(name) <= 40
    if not usual or keyword.iskeyword(name) or class_name(name) in TAKEN:
        raise PairmillError(
            expected="a filter's name: what it measures, in small letters, digits and '_', such as text_stats",
            found=repr(name),
            remedy="choose another name",
        )


def hint(name: str, paths: list[Path]) -> str:
    """What to do with the new files."""
    filter_, test = (path.relative_to(path.parents[1 + place]) for place, path in enumerate(paths))
    return f"""{filter_}   measures how bright an image is: put your own measure there
{test}   says what its numbers mean: change it alike, and run it
then, once   WRITE_GOLDEN=1 .venv/bin/pytest tests/filters/test_contract.py -k {name}
in a recipe  filters: {{{name}: {{}}}}   and   keep: [{{column: {name}.value, min: 0.1}}]
more         docs/add-a-filter.md"""
