"""What `text_stats` says about a text."""

import math
import random
import string
import time
from collections import Counter

import pytest

from filters.text_stats import MAX_CHARS, char_repetition, file_name_fraction, measure, word_repetition

HARD = (
    "a-",
    "a.",
    "a@",
    "1 ",
    "+1",
    "1(",
    "(1) ",
    "1-",
    "1/",
    "www.",
    "http://",
    "click ",
    "A1 ",
    "1234 ",
    "_",
    "1,",
    "😀 ",
)


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


def test_shares_of_letters_digits_and_marks_add_up() -> None:
    text = "Ein Häuschen, 27 m² für ½ Jahr? 🙂 हिन्दी"
    found = measure(text)
    assert found["alnum_ratio"] == pytest.approx(sum(map(str.isalnum, text)) / len(text))
    assert found["upper_ratio"] == pytest.approx(sum(map(str.isupper, text)) / len(text))
    assert found["digit_ratio"] == pytest.approx(sum(map(str.isdigit, text)) / len(text))
    assert measure("a b, c!")["special_ratio"] == pytest.approx(4 / 7)
    assert measure("हिन्दी")["special_ratio"] == 0, "accents belong to their letters"
    assert measure("!? 12 🙂")["special_ratio"] == 1


def counted_slowly(text: str, gram: int) -> float:
    """data-juicer's definition, word for word."""
    counts = Counter(text[i : i + gram] for i in range(len(text) - gram + 1))
    if not counts:
        return 0.0
    once = sum(n == 1 for n in counts.values())
    most = sorted(counts.values(), reverse=True)[: min(int(math.sqrt(len(counts))), len(counts) - once)]
    return sum(most) / counts.total()


def test_character_repetition_is_as_defined() -> None:
    assert char_repetition("abcabcabc", 3) == pytest.approx(3 / 7)
    assert char_repetition("short", 10) == char_repetition("", 10) == 0
    chance = random.Random(0)
    for _ in range(2000):
        letters, gram = string.ascii_lowercase[: chance.randint(1, 6)], chance.randint(1, 12)
        text = "".join(chance.choices(letters, k=chance.randint(0, 60))) * chance.choice([1, 1, 2, 20])
        assert char_repetition(text, gram) == pytest.approx(counted_slowly(text, gram)), (text, gram)


def test_word_repetition_counts_repeated_word_grams_without_case_and_punctuation() -> None:
    assert word_repetition("a b a b", 2) == pytest.approx(2 / 3)
    assert word_repetition("The cat! the (cat) - 12 the CAT", 2) == 1
    assert word_repetition("one two three", 10) == 0
    line = "buy the best red boats in our shop by the sea"  # eleven words: two grams of ten
    assert measure(f"{line} {line}")["word_repetition"] == pytest.approx(4 / 13)
    assert measure(line)["word_repetition"] == 0


@pytest.mark.parametrize("text", ["write to anna.b@example.org", "a+b@mail.example.co.uk"])
def test_an_e_mail_address_is_flagged(text: str) -> None:
    assert measure(text)["has_email"]
    assert not measure(text.replace("@", " at "))["has_email"]


@pytest.mark.parametrize(
    "text", ["call +49 30 1234567", "(555) 123-4567 89", "555-123-4567", "Tel.: 030/1234 5678", "+493012345678"]
)
def test_a_phone_number_is_flagged(text: str) -> None:
    assert measure(text)["has_phone"]


@pytest.mark.parametrize(
    "text",
    ["2021-03-04 12", "04.03.2021 17", "1914-1918", "800x600", "IMG_20210304_123456", "1,000,000,000", "3.14159265358"],
)
def test_dates_and_counts_are_no_phone_numbers(text: str) -> None:
    assert not measure(text)["has_phone"]


def test_boilerplate_is_the_share_of_words_in_stock_phrases() -> None:
    assert measure("Click here!")["boilerplate"] == measure("logo")["boilerplate"] == 1
    assert measure("click here, Anna")["boilerplate"] == pytest.approx(2 / 3)
    assert measure("an image of a dog")["boilerplate"] == pytest.approx(1 / 5)
    assert measure("Hier klicken")["boilerplate"] == measure("点击这里")["boilerplate"] == 1
    assert measure("a red boat that clicks when it is here")["boilerplate"] == 0


def test_no_text_is_slow() -> None:
    """Ten times the usual cost is allowed; a pattern that searches quadratically takes a thousand times as long."""
    for part in HARD:
        text = (part * 10_000)[:10_000]
        started = time.perf_counter()
        measure(text)
        assert time.perf_counter() - started < 0.1, part


def test_the_words_of_a_long_text_are_all_counted() -> None:
    for text in (
        "boat " * MAX_CHARS,
        "x" * MAX_CHARS + " y",
        "x" * (MAX_CHARS + 1),
        "x" * (MAX_CHARS - 1) + " \n yy" * 9,
    ):
        assert (measure(text)["chars"], measure(text)["words"]) == (len(text), len(text.split()))
