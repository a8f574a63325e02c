"""CapFilt's choice of texts: what survives, in which order, and what a trusted pair keeps."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from filters.texts import choose_texts
from pairs.errors import PairmillError
from pairs.rules import TextsSpec
from pairs.schemas import TEXTS

Row = tuple[list[float | None], list[float | None], bool]


def spec(keep: str, match: bool = True) -> TextsSpec:
    sources = {"from": ["texts", "blip_caption.texts"], "keep": keep}
    return TextsSpec.model_validate(sources | ({"match": "blip_match.probability"} if match else {}))


def table(rows: list[Row], matched: list[Any] | None = None) -> pa.Table:
    web = [[{"text": f"w{i}", "kind": "alt", "language": "en"} for i in range(len(own))] for own, _, _ in rows]
    made = [[f"s{i}" for i in range(len(synthetic))] for _, synthetic, _ in rows]
    probability = matched or [[*own, *synthetic] for own, synthetic, _ in rows]
    columns = {"uid": [f"u{i}" for i in range(len(rows))], "pairs.texts": pa.array(web, TEXTS)}
    columns |= {"blip_caption.texts": pa.array(made, pa.list_(pa.string()))}
    return pa.table(columns | {"blip_match.probability": pa.array(probability, pa.list_(pa.float32()))})


def obvious(row: Row, keep: str) -> list[str]:
    own, synthetic, trusted = row
    texts = [(f"w{i}", p) for i, p in enumerate(own)] + [(f"s{i}", p) for i, p in enumerate(synthetic)]
    texts = [(name, float("inf") if trusted and name[0] == "w" else p) for name, p in texts]
    texts = texts[: len(own)] if trusted and own else texts
    left = [(name, p) for name, p in texts if p is not None and p >= 0.5]

    def best(some: list[tuple[str, float]]) -> list[tuple[str, float]]:
        return [max(some, key=lambda text: text[1])] if some else []

    kinds = [[text for text in left if text[0][0] == kind] for kind in "ws"]
    chosen = {"all": left, "first": left[:1], "best": best(left), "both": best(kinds[0]) + best(kinds[1])}[keep]
    return [name for name, _ in chosen]


chance = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))


@given(st.lists(st.tuples(st.lists(chance, max_size=3), st.lists(chance, max_size=2), st.booleans()), max_size=8))
def test_the_choice_is_that_of_the_obvious_loop(rows: list[Row]) -> None:
    trusted = np.array([row[2] for row in rows], bool)
    for keep in ("all", "first", "best", "both"):
        found = choose_texts(spec(keep), table(rows), trusted)
        assert [[t["text"] for t in texts] for texts in found.to_pylist()] == [obvious(row, keep) for row in rows]


def test_without_match_all_survive_and_synthetic_texts_say_so() -> None:
    found = choose_texts(spec("all", match=False), table([([0.0], [0.0], False)]), np.array([False])).to_pylist()
    assert [(t["text"], t["kind"], t["language"], t["probability"]) for t in found[0]] == [
        ("w0", "alt", "en", None),
        ("s0", "synthetic", None, None),
    ]


def test_a_pair_that_was_not_matched_keeps_nothing() -> None:
    rows: list[Row] = [([None], [], False), ([None], [], True)]
    found = choose_texts(spec("all"), table(rows, [None, None]), np.array([False, True])).to_pylist()
    assert [[t["text"] for t in texts] for texts in found] == [[], ["w0"]]


def test_lists_that_disagree_are_our_bug_and_name_the_pair() -> None:
    with pytest.raises(AssertionError, match="u1"):
        choose_texts(spec("all"), table([([0.5], [], False)] * 2, [[0.5], [0.5, 0.6]]), np.zeros(2, bool))


def test_a_column_without_lists_is_refused() -> None:
    wrong = pa.table({"uid": ["u"], "pairs.texts": ["a"]})
    with pytest.raises(PairmillError, match=r"texts\.from"):
        choose_texts(TextsSpec(), wrong, np.zeros(1, bool))
