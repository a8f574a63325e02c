"""What a recipe misspells or forgets comes back as advice that names the place and the nearest right word."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from pairs.errors import PairmillError
from pairs.recipe import NAME, FetchSpec, Recipe, load_recipe
from pairs.rules import Rule
from pairs.strict import nearest, setting_names, strict

LEAST: dict[str, Any] = {"name": "small", "sources": {"docs": {"kind": "site"}}}


def recipe(**changes: Any) -> Recipe:
    return strict(Recipe, LEAST | changes, "r.yaml")


def refusal(**changes: Any) -> PairmillError:
    with pytest.raises(PairmillError) as caught:
        recipe(**changes)
    return caught.value


UNKNOWN: list[tuple[dict[str, Any], str, str, str]] = [
    ({"sorces": {}}, "r.yaml", "sorces", "sources"),
    ({"fetch": {"side_pixels": 9}}, "r.yaml.fetch", "side_pixels", "side_px"),
    ({"keep": [{"column": "a.b", "min": 1}, {"colum": "a.b", "min": 1}]}, "r.yaml.keep.1", "colum", "column"),
    ({"texts": {"form": ["texts"]}}, "r.yaml.texts", "form", "from"),
    ({"pretrain": {"step": 3}}, "r.yaml.pretrain", "step", "steps"),
    ({"pretrain": {"model": {"patch": 8}}}, "r.yaml.pretrain.model", "patch", "patch_px"),
    ({"pretrain": {"model": {"vision": {"layer": 1}}}}, "r.yaml.pretrain.model.vision", "layer", "layers"),
    (
        {"first_filter": {"blip": {"text": {"layers": 1, "width": 8, "head": 1}}}},
        "r.yaml.first_filter.blip.text",
        "head",
        "heads",
    ),
    ({"evaluate": {"zero_shot": {"paht": "x"}}}, "r.yaml.evaluate.zero_shot", "paht", "path"),
    ({"gates": {"min_pair": 3}}, "r.yaml.gates", "min_pair", "min_pairs"),
    ({"canaries": {"per_defects": 3}}, "r.yaml.canaries", "per_defects", "per_defect"),
]


@pytest.mark.parametrize(("changes", "where", "found", "right"), UNKNOWN)
def test_an_unknown_key_names_its_place_and_the_nearest(
    changes: dict[str, Any], where: str, found: str, right: str
) -> None:
    error = refusal(**changes)
    assert error.expected == f"a known key at {where}"
    assert error.found == repr(found) and error.remedy == f"did you mean {right!r}?"


def test_a_key_like_no_other_lists_them_all() -> None:
    remedy = refusal(gates={"zzz": 1}).remedy
    assert remedy == "use one of: min_canary_recall, min_captions, min_fetch_success, min_pairs"
    assert refusal(**{"1": 2}).found == "'1'"
    with pytest.raises(PairmillError, match="a known key at r"):
        strict(Recipe, LEAST | {1: 2}, "r")  # YAML has keys that aren't texts


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"fetch": {"side_px": "wide"}}, "r.yaml.fetch.side_px", "'wide'"),
    ({"fetch": {"side_px": 3}}, "r.yaml.fetch.side_px", "3"),
    ({"fetch": {"format": "gif"}}, "r.yaml.fetch.format", "'gif'"),
    ({"fetch": {"quality": 101}}, "r.yaml.fetch.quality", "101"),
    ({"rounds": 0}, "r.yaml.rounds", "0"),
    ({"engine": "spark"}, "r.yaml.engine", "'spark'"),
    ({"sources": {}}, "r.yaml.sources", "{}"),
    ({"sources": {"docs": {}}}, "r.yaml.sources.docs.kind", "{}"),
    ({"filters": {"image_stats": None}}, "r.yaml.filters.image_stats", "None"),
    ({"keep": [{"column": "a", "min": float("nan")}]}, "r.yaml.keep.0.min", "nan"),
    ({"pretrain": {"learning_rate": float("inf")}}, "r.yaml.pretrain.learning_rate", "inf"),
]


@pytest.mark.parametrize(("changes", "where", "found"), WRONG)
def test_a_wrong_value_is_named(changes: dict[str, Any], where: str, found: str) -> None:
    error = refusal(**changes)
    assert error.expected.startswith(f"{where}: ") and error.found == found


@pytest.mark.parametrize("name", ["../../etc", "a/b", "", "A", "-a", "a b", "a\n", "x" * 65, "é"])
def test_names_that_would_leave_their_folder_are_refused(name: str) -> None:
    assert "r.yaml.name" in refusal(name=name).expected
    assert "r.yaml.sources" in refusal(sources={name: {"kind": "site"}}).expected


def test_a_misspelt_key_explains_the_missing_one() -> None:
    with pytest.raises(PairmillError, match="did you mean 'name'"):
        strict(Recipe, {"nam": "x", "sources": LEAST["sources"]}, "r")
    with pytest.raises(PairmillError, match=r"r\.name: Field required"):
        strict(Recipe, {"sources": LEAST["sources"]}, "r")


def test_a_source_keeps_its_own_settings() -> None:
    made = recipe(sources={"a": {"kind": "site", "seeds": ["x"]}, "b": {"kind": "folder", "trusted": True}})
    assert made.sources["a"].settings == {"seeds": ["x"]} and made.sources["b"].settings == {}
    assert made.trusted == ["b"]


@pytest.mark.parametrize("place", ["pretrain", "first_filter"])
def test_weights_are_of_sources(place: str) -> None:
    def settings(name: str) -> dict[str, Any]:
        spec = {"weights": {name: 2.5}}
        return {place: spec if place == "pretrain" else {"clip": spec}}

    recipe(**settings("docs"))
    assert "did you mean 'docs'?" in refusal(**settings("dosc")).expected


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe().seed = 3  # type: ignore[misc]


BAD_RULES: list[tuple[dict[str, Any], str]] = [
    ({}, "names a `column`"),
    ({"column": "a"}, "names a `column`"),
    ({"min": 1}, "names a `column`"),
    ({"column": "a", "top_fraction": 0.3, "min": 0.1}, "stands alone"),
    ({"column": "a", "top_fraction": 0.3, "is_null": False}, "stands alone"),
    ({"one_per": "g", "column": "a"}, "stands alone"),
    ({"one_per": "g", "is_null": True}, "stands alone"),
    ({"column": "a", "min": 1, "best": "b"}, "belongs to `one_per`"),
    ({"column": "a", "between": [1, 2], "max": 3}, "one or the other"),
    ({"column": "a", "between": [2, 1]}, "ends before it begins"),
    ({"column": "a", "quantile": [0.9, 0.1]}, "ends before it begins"),
    ({"column": "a", "target_recall": 0.9}, "go together"),
    ({"column": "a", "min": 1, "defect": "blank"}, "go together"),
    ({"column": "a", "min": 1, "drop": "above"}, "belongs to `target_recall`"),
    ({"column": "a", "target_recall": 0.9, "defect": "blank", "min": 1}, "stands alone"),
    ({"one_per": "g", "sources": {"docs": {"min": 1}}}, "stands alone"),
    ({"column": "a", "min": 1, "sources": {"docs": {}}}, "states no test"),
]


@pytest.mark.parametrize(("rule", "words"), BAD_RULES)
def test_a_rule_has_one_shape(rule: dict[str, Any], words: str) -> None:
    error = refusal(keep=[{"column": "fine", "min": 1}, rule])
    assert "r.yaml.keep.1" in error.expected and words in error.expected


def test_equal_thresholds_are_still_two() -> None:
    same = 0.3  # one object, as a YAML anchor gives
    assert "stands alone" in refusal(keep=[{"column": "a", "top_fraction": same, "min": same}]).expected


def test_a_misspelt_test_of_a_rule_names_the_nearest() -> None:
    for keys, hint in (({"betwen": [1, 2]}, "between"), ({"target_recal": 1}, "target_recall"), ({"im": [1]}, "in")):
        assert f"did you mean '{hint}'" in refusal(keep=[{"column": "a", **keys}]).remedy
    wrong = {"column": "a", "min": 1, "sources": {"docs": {"mni": 1}}}
    assert "did you mean 'min'" in refusal(keep=[wrong]).remedy


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_a_fraction_is_a_fraction(fraction: float) -> None:
    assert "keep.0.top_fraction" in refusal(keep=[{"column": "a", "top_fraction": fraction}]).expected


def test_good_rules_keep_their_values_and_have_names() -> None:
    rules = [
        {"column": "a.b", "min": 0, "max": 2},
        {"column": "a.l", "equals": False},
        {"column": "a.l", "among": ["en", "de"], "over": "any"},
        {"column": "c.x", "top_fraction": 1},
        {"column": "c.x", "between": [0, 2]},
        {"column": "c.x", "target_recall": 0.9, "defect": "blank", "drop": "above"},
        {"column": "c.x", "min": 3, "sources": {"docs": {"min": 5}, "laion": False}},
        {"column": "c.x", "is_null": False},
        {"one_per": "d.group", "best": "c.x"},
        {"one_per": "e.group"},
    ]
    made = recipe(keep=rules).keep
    assert made[0].min == 0 and made[1].equals is False and made[7].is_null is False
    assert [rule.name for rule in made] == [
        "a.b min 0.0 max 2.0",
        "a.l equals False",
        "any a.l among ['en', 'de']",
        "c.x top_fraction 1.0",
        "c.x between [0.0, 2.0]",
        "c.x target_recall 0.9 defect blank drop above",
        "c.x min 3.0 (docs: min 5.0; laion: off)",
        "c.x is_null False",
        "one_per d.group best c.x",
        "one_per e.group",
    ]
    assert len({rule.name for rule in made}) == len(made)


def test_one_per_comes_last() -> None:
    rules = [{"one_per": "a.group"}, {"column": "b", "min": 1}]
    assert "come last" in refusal(keep=rules).expected
    assert [r.one_per for r in recipe(keep=rules[::-1]).keep] == [None, "a.group"]


@given(st.lists(st.booleans(), max_size=6))
def test_one_per_comes_last_in_any_length(kinds: list[bool]) -> None:
    rules = [{"one_per": "a.g"} if kind else {"column": "b", "min": 1} for kind in kinds]
    ordered = "tf" not in "".join("t" if kind else "f" for kind in kinds)
    if ordered:
        assert len(recipe(keep=rules).keep) == len(kinds)
    else:
        refusal(keep=rules)


@dataclass(frozen=True)
class Settings:
    size: int = 3
    names: tuple[str, ...] = ()
    made: int = field(default=0, init=False)


def test_settings_of_a_dataclass_get_the_same_advice() -> None:
    assert strict(Settings, {"size": 4, "names": ["a"]}, "filters.x") == Settings(4, ("a",))
    assert setting_names(Settings) == ["size", "names"]
    for data, words in (({"sise": 4}, "did you mean 'size'"), ({"made": 1}, "use one of"), ({1: 1}, "use one of")):
        with pytest.raises(PairmillError, match=words) as caught:
            strict(Settings, data, "filters.x")
        assert caught.value.expected == "a known key at filters.x"
    with pytest.raises(PairmillError, match=r"filters\.x\.size"):
        strict(Settings, {"size": "big"}, "filters.x")


def test_a_nested_model_is_followed_through_lists_and_optionals() -> None:
    class Inner(BaseModel):
        model_config = ConfigDict(extra="forbid")
        colour: str = ""

    class Outer(BaseModel):
        model_config = ConfigDict(extra="forbid")
        boxes: dict[str, list[Inner]] = {}
        one: Inner | None = None

    for data, where in (({"boxes": {"a": [{"color": "x"}]}}, "o.boxes.a.0"), ({"one": {"color": "x"}}, "o.one")):
        with pytest.raises(PairmillError, match="did you mean 'colour'") as caught:
            strict(Outer, data, "o")
        assert caught.value.expected == f"a known key at {where}"


def test_nearest() -> None:
    assert nearest("clipp", ["clip", "language"]) == "did you mean 'clip'?"
    assert nearest("qqq", ["b", "a"]) == "use one of: a, b"


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "a tab": (b"name:\n\tx: 1\n", "line 2"),
    "an open bracket": (b"name: [\n", "YAML in"),
    "a list": (b"- a\n", "found list"),
    "a text": (b"hello\n", "found str"),
    "nothing": (b"", "found NoneType"),
    "other bytes": (b"name: \xff\n", "YAML in"),
    "a date that isn't": (b"name: 2024-99-99\n", "YAML in"),
    "an object": (b"name: !!python/object/apply:os.system ['true']\n", "YAML in"),
    "a key twice": (b"name: small\nsources: {a: {kind: site}, b: {kind: site}, a: {kind: urls}}\n", "'a' stands twice"),
    "a section twice": (b"name: a\nseed: 1\nname: b\n", "'name' stands twice"),
    "a list as a key": (b"[1]: 2\n", "found"),
    "a control character": (b"name: \x00\n", "YAML in"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_malformed_file_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    content, words = BAD_FILES[kind]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(PairmillError, match=r"bad\.yaml") as caught:
        load_recipe(path)
    assert words in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="no such file") as caught:
        load_recipe(tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in caught.value.expected
    with pytest.raises(PairmillError, match="is a directory"):
        load_recipe(tmp_path)


def test_a_file_is_loaded(tmp_path: Path) -> None:
    text = "name: größe-ok\n".replace("größe", "size")
    text += "base: &b {kind: site}\n".replace("base: &b", "sources: {a: &b").replace(
        "}\n", "}, b: {<<: *b, seeds: [ü]}}\n"
    )
    (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    made = load_recipe(tmp_path / "r.yaml")
    assert (
        made.name == "size-ok" and made.sources["b"].kind == "site" and made.sources["b"].settings == {"seeds": ["ü"]}
    )
    assert made == strict(
        Recipe, {"name": "size-ok", "sources": {"a": {"kind": "site"}, "b": {"kind": "site", "seeds": ["ü"]}}}, "x"
    )
    assert NAME and Rule(column="a", min=1.0).over == "first"


def test_the_recipes_of_the_project_load() -> None:
    found = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert all(load_recipe(path).sources for path in found)


def test_the_error_shows_both_sides_and_the_way_on_and_travels() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(PairmillError(expected="a dog", found="a cat", remedy="look again")))
    assert str(error).split() == ["expected", "a", "dog", "found", "a", "cat", "do", "look", "again"]
    assert (error.expected, error.found, error.remedy) == ("a dog", "a cat", "look again")


@pytest.mark.parametrize("agent", ["", " ", "/1.0", "(+x)", "two\nlines", "naïve/1"])
def test_an_agent_without_a_token_is_refused(agent: str) -> None:
    with pytest.raises(PairmillError, match=r"fetch\.agent"):
        strict(FetchSpec, {"agent": agent}, "fetch")
    assert strict(FetchSpec, {"agent": "some-crawler/2.0 (+https://a.test/)"}, "fetch")
