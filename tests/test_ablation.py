"""CapFilt's ablation: its arms are recipes that differ in their texts alone, and differences are paired by seed."""

import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def capfilt(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    import capfilt

    return capfilt


def test_arms_differ_in_their_texts_alone(capfilt) -> None:  # type: ignore[no-untyped-def]
    from pairs.recipe import Recipe
    from pairs.strict import strict

    base = yaml.safe_load((ROOT / "recipes/capfilt.yaml").read_text())
    made = capfilt.recipes(base, capfilt.ARMS, rules=False)
    arms = {name: strict(Recipe, recipe, name) for name, recipe in made.items()}
    assert list(arms) == ["raw", "filter", "captioner", "capfilt"] and arms["capfilt"].rounds == 2
    assert all(arm.pretrain == strict(Recipe, base, "base").pretrain for arm in arms.values())
    assert all(arm.keep == [] and arm.canaries == arms["raw"].canaries for arm in arms.values())
    told = {name: (arm.texts.sources, arm.texts.match, arm.texts.false_drops) for name, arm in arms.items()}
    web, both = ["texts"], ["texts", "blip_caption.texts"]
    matched = base["texts"]["match"], base["texts"]["false_drops"]
    assert told["raw"] == (web, None, None) and told["filter"] == (web, *matched)
    assert told["captioner"] == (both, None, None) and told["capfilt"] == (both, *matched)


def test_differences_are_paired_by_seed(capfilt) -> None:  # type: ignore[no-untyped-def]
    found = {1: {"raw": {"a": 0.1}, "filter": {"a": 0.2, "b": 1.0}}, 2: {"raw": {"a": 0.5}, "filter": {"a": 0.8}}}
    lines = capfilt.table(found).splitlines()
    assert lines[0] == "| figure | raw | filter |"
    assert lines[2:] == ["| a | 0.300 | 0.500 (+0.200 ± 0.100) |", "| b |  | 1.000 |"]
