"""A curation of pairs that nobody vouches for, end to end without a training: canaries of every defect, a threshold
fitted to them, a source with a condition of its own, gates by defect, and the page that tells it."""

import re
from pathlib import Path
from typing import Any

import pytest

from pairs.errors import PairmillError
from pairs.recipe import Recipe
from pairs.strict import strict
from pipelines import stages
from pipelines.console import Console
from pipelines.report.page import render
from pipelines.run import Run, open_run
from tests.filters.shards import draw, encode
from tests.pipelines import flow

PAIRS, BLANK = 48, "image_stats.blankness target_recall 0.9 defect blank drop above"


def values(root: Path) -> dict[str, Any]:
    return {
        "name": "plain",
        "sources": {name: {"kind": "folder", "path": f"{root}/{name}"} for name in ("one", "two")},
        "fetch": {"side_px": 96},
        "filters": {"image_stats": {}, "text_stats": {}, "language": {}, "image_hash": {}},
        "reducers": {"exact_duplicates": {}, "near_duplicates": {}},
        "keep": [
            {"column": "image_stats.blankness", "target_recall": 0.9, "defect": "blank", "drop": "above"},
            {"column": "text_stats.words", "between": [2, 50], "sources": {"two": {"min": 4}}},
            {"one_per": "exact_duplicates.group"},
            {"one_per": "near_duplicates.group"},
        ],
        "canaries": {"per_defect": 40, "max_fraction": 1.0},
        "engine": "inline",
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two folders of drawings, curated and reported."""
    root = tmp_path_factory.mktemp("plain")
    for start, name in ((0, "one"), (500, "two")):
        (root / name).mkdir()
        for n in range(start, start + PAIRS // 2):
            (root / name / f"{n}.jpg").write_bytes(encode(draw(n, 96, 96), "jpg"))
            (root / name / f"{n}.txt").write_text(f"drawing {n} of several boxes")
    made = open_run(flow.write_recipe(root / "r.yaml", values(root)), workspace=str(root / "s"), console=Console(True))
    stages.check(made.recipe)
    with made.workspace.lock():
        stages.crawl(made)
        stages.fetch(made)
        stages.curate(made, 1, stages.first_filter(made))
        stages.report(made)
    return made


def test_every_defect_is_told_on_the_page(run: Run) -> None:
    (told,) = run.read("report.json")["rounds"]
    whole = {row["defect"]: row for row in told["canaries"] if row["rule"] == "selection"}
    assert len(whole) == 7 and all(row["n"] >= 8 for row in whole.values())
    assert whole["exact_duplicate"]["recall"]["value"] == 1.0 and whole["blank"]["recall"]["value"] >= 0.6
    assert whole["watermark"]["recall"]["value"] < 0.3, "no rule looks for it"
    page = " ".join(render(run.read("report.json")).split())
    assert "Nobody vouches for the pairs" in page and page.count("false drops</text>") >= 3
    for word in (*whole, "mirrored", "near_duplicates.distance", BLANK, "at most 0.", "over", "fitting canaries"):
        assert word in page, word


def test_gates_may_name_their_defects(run: Run) -> None:
    picked = run.read("round-1/curation.json")
    wrong: list[tuple[Any, str | None]] = [({"exact_duplicate": 0.9}, None), ({"watermark": 0.9}, "90% of watermark")]
    for floors, words in [*wrong, (0.5, "watermark")]:
        gates = run.recipe.gates.model_copy(update={"min_canary_recall": floors})
        run.recipe = run.recipe.model_copy(update={"gates": gates})
        if words is None:
            stages.gates(run, 1, picked)
            n = picked["canaries"]["defects"]["exact_duplicate"]["canaries"]
            passed = f"exact_duplicate 100.0% of {n} reporting canaries"
            assert run.read("stages.json")["round-1/gates"]["note"] == passed
            continue
        with pytest.raises(PairmillError, match=words) as error:
            stages.gates(run, 1, picked)
        assert re.search(r"watermark \d+\.\d% of \d+ reporting canaries", error.value.found)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"keep": [{"column": "text_stats.words", "min": 1, "sources": {"on": {"min": 2}}}]}, "did you mean 'one'"),
    ({"keep": [{"column": "text_stats.words", "target_recall": 0.5, "defect": "blnk"}]}, "did you mean 'blank'"),
    ({"keep": [{"column": "near_duplicates.distance", "target_recall": 0.5, "defect": "blank"}]}, "image_hash"),
    ({"canaries": {"defects": ["watermarks"]}}, "did you mean 'watermark'"),
    ({"gates": {"min_canary_recall": {"swapped": 0.5}}}, "did you mean 'swapped_text'"),
    ({"keep": [{"column": "pairs.source_uid", "in_list": "/nowhere.npy"}]}, "uid list"),
    ({"keep": [{"column": "text_stats.word", "min": 1}]}, "did you mean 'text_stats.words'"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_what_a_recipe_misspells_is_told_before_anything_runs(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    recipe = strict(Recipe, values(tmp_path) | changes, "r")
    with pytest.raises(PairmillError, match=words):
        stages.check(recipe)
