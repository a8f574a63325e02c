"""Documents are true: their links lead somewhere, and every setting of a recipe is explained."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from pairs import recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/results/*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_setting_is_explained() -> None:
    told = (ROOT / "docs" / "recipes.md").read_text()
    specs = [
        s for s in vars(recipe).values() if isinstance(s, type) and issubclass(s, BaseModel) and s is not recipe.Spec
    ]
    missing = [
        f"{spec.__name__}.{field.alias or name}"
        for spec in specs
        for name, field in spec.model_fields.items()
        if f"`{field.alias or name}`" not in told
    ]
    assert not missing


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_ship_are_sound(path: Path) -> None:
    assert recipe.load_recipe(path).sources


def test_every_make_target_is_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))
    assert targets == set(re.findall(r"^([a-z-]+):.*## \w", text, re.MULTILINE))
