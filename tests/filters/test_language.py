"""What `language` says about a text."""

import pytest

from filters.base import Batch
from filters.language import Language, detect

SENTENCES = {
    "en": "A woman is reading a newspaper on a bench in the park",
    "de": "Ein Mann fährt mit dem Fahrrad durch die Stadt",
    "fr": "Une petite fille mange une pomme dans le jardin",
    "es": "El perro negro duerme delante de la puerta de la casa",
    "ja": "公園のベンチで新聞を読んでいる女性",
    "ru": "Женщина читает газету на скамейке в парке",
}


@pytest.mark.parametrize("code", SENTENCES)
def test_a_sentence_is_recognised(code: str) -> None:
    found, probability = detect(SENTENCES[code])
    assert found == code
    assert 0.5 < probability <= 1


def test_lines_and_capitals_do_not_matter() -> None:
    assert detect(SENTENCES["de"].replace(" ", "\n")) == detect(SENTENCES["de"])
    assert detect(SENTENCES["en"].upper())[0] == "en"


def test_a_text_without_letters_has_no_language() -> None:
    found = Language().score(Batch(["a", "b", "c"], {"text": [None, "", "2041 - 17!"]}))
    assert found == {"code": [None] * 3, "probability": [None] * 3}


def test_a_caption_of_megabytes_is_read_from_its_start() -> None:
    assert detect(" " * 100_000 + SENTENCES["fr"] + " x" * 1_000_000)[0] == "fr"
