"""What `text_stats` says about a text."""

import pytest

from filters.text_stats import file_name_fraction, measure


def test_a_caption_of_five_words() -> None:
    found = measure("Two dogs run, barking loudly")
    assert (found["words"], found["chars"]) == (5, 28)
    assert found["upper_ratio"] == pytest.approx(1 / 28)
    assert found["alnum_ratio"] == pytest.approx(23 / 28)
    assert found["digit_ratio"] == 0
    assert not found["has_url"]


def test_characters_are_code_points_of_any_script() -> None:
    assert measure("看看这个")["chars"] == 4
    assert measure("看看这个")["alnum_ratio"] == 1


def test_ratios_of_an_empty_text_cannot_be_measured() -> None:
    assert measure("")["chars"] == 0
    assert "alnum_ratio" not in measure("")
    assert measure(" \n")["words"] == 0


@pytest.mark.parametrize(
    "text", ["IMG_2041.JPG", "dsc-0031.jpeg", "photo.png", "800x600", "my_summer_house", "d41d8cd98f00b204e9800998ecf8"]
)
def test_a_file_name_looks_like_one(text: str) -> None:
    assert file_name_fraction(text) == 1


@pytest.mark.parametrize("text", ["a red boat", "state-of-the-art kitchen", "Apollo 11", "at 5 o'clock", "3D model"])
def test_a_caption_does_not_look_like_a_file_name(text: str) -> None:
    assert file_name_fraction(text) == 0


def test_a_file_name_beside_words_is_a_part_of_the_text() -> None:
    assert file_name_fraction("boat photo_0031.png") == pytest.approx(14 / 18)


@pytest.mark.parametrize("text", ["see https://example.org/a", "www.example.org", "buy at example.com today"])
def test_an_address_is_flagged(text: str) -> None:
    assert measure(text)["has_url"]


@pytest.mark.parametrize("text", ["a dog. then a cat", "the end.No space", "e.g. this"])
def test_plain_punctuation_is_no_address(text: str) -> None:
    assert not measure(text)["has_url"]
