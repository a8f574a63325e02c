"""Rules: null passes none of them, lists are judged by any, all or first, a quantile becomes a number."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.rules import Threshold, fit_recall, passes, quantile
from pairs.errors import PairmillError
from pairs.rules import Rule


def kept(rule: dict[str, object], values: list[object], kind: pa.DataType) -> list[bool]:
    return passes(Rule(column="a.b", **rule), pa.array(values, kind), None).tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"min": 2}, [False, True, True, False, False]),
        ({"max": 2}, [True, True, False, False, False]),
        ({"min": 2, "max": 2}, [False, True, False, False, False]),
        ({"equals": 2}, [False, True, False, False, False]),
        ({"in": [1, 3]}, [True, False, True, False, False]),
        ({"between": [2, 3]}, [False, True, True, False, False]),
        ({"is_null": True}, [False, False, False, True, True]),
        ({"is_null": False}, [True, True, True, False, False]),
        ({"is_null": True, "min": 3}, [False, False, True, True, True]),
    ],
)
def test_null_and_nan_pass_nothing_but_is_null(rule: dict[str, object], expected: list[bool]) -> None:
    assert kept(rule, [1.0, 2.0, 3.0, None, float("nan")], pa.float64()) == expected


def test_words_and_truths() -> None:
    assert kept({"equals": "en"}, ["en", "de", None], pa.string()) == [True, False, False]
    assert kept({"among": ["en", "fr"]}, ["en", "de", None], pa.string()) == [True, False, False]
    assert kept({"equals": True}, [True, False, None], pa.bool_()) == [True, False, False]
    assert kept({"equals": 3}, [3, 4, None], pa.int32()) == [True, False, False]


@pytest.mark.parametrize(("rule", "kind"), [({"min": 1}, pa.string()), ({"equals": "en"}, pa.int32())])
def test_a_rule_of_another_kind_than_its_column_is_refused(rule: dict[str, object], kind: pa.DataType) -> None:
    with pytest.raises(PairmillError, match=r"a\.b"):
        kept(rule, [None], kind)


lists = st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=4)), max_size=8)


@given(lists, st.sampled_from(["any", "all", "first"]))
def test_lists_are_judged_as_their_word_says(values: list[list[int | None] | None], over: str) -> None:
    tests = [[v is not None and v >= 2 for v in row] if row else [] for row in values]
    join = {"any": any, "all": lambda row: bool(row) and all(row), "first": lambda row: bool(row) and row[0]}[over]
    assert kept({"min": 2, "over": over}, list(values), pa.list_(pa.int32())) == [join(row) for row in tests]


@given(st.lists(st.one_of(st.none(), st.floats(-1, 1, width=32)), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_the_threshold_that_the_top_fraction_reaches(values: list[float | None], share: float) -> None:
    rule, column = Rule(column="a.b", top_fraction=share), pa.array(values, pa.float32())
    found = quantile(rule, column, np.ones(len(values), bool))
    scored = sorted((v for v in values if v is not None), reverse=True)
    if not scored:
        assert found is None and not passes(rule, column, found).any()
        return
    count = max(1, round(share * len(scored)))
    assert found == Threshold(pytest.approx(scored[count - 1]), len(scored))
    reached = passes(rule, column, found)
    assert reached.sum() == sum(v >= scored[count - 1] for v in scored)
    assert reached.tolist() == kept({"min": found.value}, list(values), pa.float32())


def test_rows_that_do_not_count_move_no_quantile() -> None:
    rule = Rule(column="a.b", top_fraction=0.5)
    counts = np.array([True, True, False, False])
    assert quantile(rule, pa.array([0.1, 0.2, 0.9, 0.8]), counts) == Threshold(0.2, 2)


def test_a_pair_of_quantiles_keeps_the_middle() -> None:
    column, counts = pa.array([0.1, 0.4, 0.3, None, 0.2], pa.float64()), np.ones(5, bool)
    rule = Rule(column="a.b", quantile=(0.25, 0.75))
    found = quantile(rule, column, counts)
    assert found == Threshold(0.2, 4, 0.3)
    assert passes(rule, column, found).tolist() == [False, False, True, False, True]
    assert quantile(Rule(column="a.b", quantile=(0.0, 0.0)), column, counts) == Threshold(0.1, 4, 0.1)
    assert quantile(Rule(column="a.b", quantile=(0.5, 1.0)), column, counts) == Threshold(0.3, 4)


canary_values = st.lists(st.one_of(st.none(), st.floats(-1, 1, width=32)), min_size=1, max_size=20)


@given(canary_values, st.sampled_from([0.1, 0.5, 0.9, 1.0]), st.sampled_from([None, "below", "above"]))
def test_a_target_recall_is_reached_by_the_mildest_threshold(
    values: list[float | None], target: float, drop: str | None
) -> None:
    rule = Rule(column="a.b", target_recall=target, defect="blank", drop=drop)  # type: ignore[arg-type]
    column = pa.array(values, pa.float32())
    if all(v is None for v in values):
        with pytest.raises(PairmillError, match="none with a value"):
            fit_recall(rule, column)
        return
    found = fit_recall(rule, column)
    caught = ~passes(rule, column, found)
    assert caught.sum() >= target * len(values) - 1e-9 and found.rows == len(values)
    nulls = sum(v is None for v in values)
    if caught.sum() > nulls:  # one value milder, and the target is missed
        edge = (
            max(v for v, c in zip(values, caught, strict=True) if c and v is not None)
            if drop != "above"
            else min(v for v, c in zip(values, caught, strict=True) if c and v is not None)
        )
        assert sum(c and v != edge for v, c in zip(values, caught, strict=True)) < target * len(values) - 1e-9


def test_a_target_recall_on_lists_asks_what_the_rule_asks() -> None:
    column = pa.array([[0.1, 0.8], [0.2, 0.3], [], [0.9, 0.7]], pa.list_(pa.float64()))
    for over, drop, dropped in (("any", None, {1, 2}), ("all", None, {0, 2}), ("first", "above", {2, 3})):
        rule = Rule(column="a.b", over=over, target_recall=0.5, defect="blank", drop=drop)  # type: ignore[arg-type]
        caught = ~passes(rule, column, fit_recall(rule, column))
        assert set(np.flatnonzero(caught)) == dropped, over


def test_no_canaries_fit_nothing() -> None:
    with pytest.raises(PairmillError, match="no canaries"):
        fit_recall(Rule(column="a.b", target_recall=0.5, defect="blank"), pa.array([], pa.float32()))


@given(lists, st.sampled_from(["any", "all", "first"]))
def test_between_on_lists_asks_one_value_for_both_ends(values: list[list[int | None] | None], over: str) -> None:
    tests = [[v is not None and 1 <= v <= 3 for v in row] if row else [] for row in values]
    join = {"any": any, "all": lambda row: bool(row) and all(row), "first": lambda row: bool(row) and row[0]}[over]
    assert kept({"between": (1, 3), "over": over}, list(values), pa.list_(pa.int32())) == [join(row) for row in tests]
