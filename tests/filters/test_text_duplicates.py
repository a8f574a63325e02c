"""Text duplicates: what is found is what the obvious loop finds among texts that share a bucket; short, long, blank."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.base import Reducer
from filters.lookup import load_reducer
from filters.parts import nothing
from filters.shingles import jaccard, normal, shingles, sketch
from filters.text_duplicates import TextDuplicates
from pairs.errors import PairmillError

CAPTION = "A small red boat on the quiet lake, seen from the north in the evening"


def table(texts: list[str | None], start: int = 0) -> pa.Table:
    uids = [f"{number:03d}" for number in range(start, start + len(texts))]
    columns = {"uid": uids, "increment": [f"{start:04d}"] * len(uids), "text": texts}
    trusted = pa.array([False] * len(uids), pa.bool_())
    return pa.table({name: pa.array(v, pa.string()) for name, v in columns.items()} | {"trusted": trusted})


def reduced(reducer: Reducer, texts: list[str | None], existing: pa.Table | None = None, start: int = 0) -> pa.Table:
    new = reducer.condense(table(texts, start))
    return reducer.reduce(nothing(reducer, new, own=True) if existing is None else existing, new)


def groups(texts: list[str | None], **chosen: Any) -> list[str | None]:
    return reduced(TextDuplicates(**chosen), texts)["group"].to_pylist()


def pieces(text: str) -> set[str]:
    """The oracle's: 5 characters each, the whole of a shorter text."""
    return {text[place : place + 5] for place in range(max(len(text) - 4, 1))} if text else set()


def alike(a: str, b: str) -> float:
    return len(pieces(a) & pieces(b)) / max(len(pieces(a) | pieces(b)), 1)


def test_small_changes_join_and_other_texts_do_not() -> None:
    changed = CAPTION.upper().replace(",", "  -") + "!"
    word = CAPTION.replace("red", "rot")
    assert groups([CAPTION, changed, word, "A dog", "A cat", "a DOG."]) == ["000", "000", "000", "003", "004", "003"]
    table_ = reduced(TextDuplicates(), [CAPTION, changed, word])
    assert table_["jaccard"].to_pylist() == [1, 1, pytest.approx(alike(normal(CAPTION), normal(word)))]


def test_other_scripts_short_texts_and_what_has_no_letters() -> None:
    japanese = "静かな湖に浮かぶ小さな赤いボートを北から見た夕方の景色"
    assert groups([japanese, japanese + "。", "犬", "猫", "犬", None, "", " ?! "]) == [
        "000", "000", "002", "003", "002", None, None, None]  # fmt: skip


def test_a_caption_of_many_megabytes_counts_by_its_beginning() -> None:
    assert groups(["word " * 2_000_000, "word " * 3000, "other"]) == ["000", "000", "002"]


def test_a_later_increment_joins_earlier_leaders_alone() -> None:
    reducer = TextDuplicates()
    near = CAPTION.replace("red", "rot")
    chain = [near, near + " hour in June", "Something else entirely"]
    assert alike(normal(chain[1]), normal(near)) > 0.8 > alike(normal(chain[1]), normal(CAPTION))
    old = reducer.condense(table([CAPTION]))
    old = old.append_column("group", old["uid"]).append_column("jaccard", pa.array([1.0], pa.float32()))
    found = reduced(reducer, list(chain), old, 500)["group"].to_pylist()
    assert found == ["000", "501", "502"], "near a member is not near its leader"


words = st.sampled_from(["boat", "lake", "dog", "evening", "north", "red", "small", "tree", "window", "house"])
captions = st.lists(words, max_size=9).map(" ".join)


@settings(max_examples=40)
@given(st.lists(captions, max_size=20), st.sampled_from([0.5, 0.7, 0.9]))
def test_groups_are_those_of_the_obvious_loop_among_texts_that_share_a_bucket(texts: list[str], minimum: float) -> None:
    buckets = sketch(*shingles(texts))
    found: list[int | None] = []
    for row, text in enumerate(texts):
        ahead = (i for i in range(row) if found[i] == i and (buckets[i] == buckets[row]).any())
        near = (i for i in ahead if alike(texts[i], text) >= minimum)
        found.append(next(near, row) if text else None)
    assert groups(list(texts), min_jaccard=minimum) == [None if i is None else f"{i:03d}" for i in found]


@given(st.lists(captions, min_size=1, max_size=12))
def test_pieces_and_jaccard_are_those_of_sets(texts: list[str]) -> None:
    piece_P, offsets = shingles(texts)
    assert np.diff(offsets).tolist() == [len(pieces(text)) for text in texts]
    left, right = (side.ravel() for side in np.meshgrid(range(len(texts)), range(len(texts))))
    expected = [alike(texts[a], texts[b]) for a, b in zip(left, right, strict=True)]
    assert jaccard(piece_P, offsets, left, right, most=64) == pytest.approx(expected)


def test_buckets_are_shared_as_often_as_the_curve_says() -> None:
    chance = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    made = ["".join(row) for row in chance.choice(letters, (2000, 60))]
    changed = [text[: (place := 6 + n % 45)] + "9" + text[place + 1 :] for n, text in enumerate(made)]
    share = np.mean([alike(a, b) for a, b in zip(made, changed, strict=True)])  # 51 of 61 pieces: 0.836
    one, other = (sketch(*shingles(texts)) for texts in (made, changed))
    expected = 1 - (1 - share**8) ** 14
    assert (one == other).any(axis=1).mean() == pytest.approx(expected, abs=0.02)
    assert (one == np.roll(other, 1, axis=0)).any(axis=1).mean() < 0.001


def test_a_query_leaves_the_named_row_out_but_not_its_group() -> None:
    reducer = TextDuplicates()
    corpus = reducer.condense(table([CAPTION, CAPTION + "!", "A cat"]))
    corpus = corpus.append_column("group", pa.array(["000", "000", "002"]))
    queries = reducer.condense(table([CAPTION, CAPTION, "A cat", "A cat", None]))
    found = reducer.query(corpus, queries, [None, "000", None, "002", None])
    assert found["group"].to_pylist() == ["000", "000", "002", None, None]


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(PairmillError, match="min_jaccard"):
        load_reducer("text_duplicates", {"min_jaccard": 0.1})


def test_a_template_crowds_no_bucket_and_its_copies_are_still_found() -> None:
    made = [f"Photo number {number * 7919 % 10_007} in the archive of the town" for number in range(300)]
    buckets = sketch(*shingles([normal(text) for text in made]))
    crowd = max(np.unique(buckets[:, bucket], return_counts=True)[1].max() for bucket in range(14))
    assert crowd > 8, "more than are compared"
    found = groups([*made, *(text + "!" for text in made)], min_jaccard=0.95)
    assert found[300:] == found[:300]
