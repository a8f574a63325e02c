"""A tokenizer from a folder, as SigLIP's is: texts are always `context` tokens, and what is cut is told."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from pairs.errors import PairmillError
from training.blip_data import make_tokenizer
from training.tokens import Tokeniser, encode


@pytest.fixture
def folder(tmp_path: Path) -> str:
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "a", "red", "boat"])}
    plain = Tokenizer(WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    return str(tmp_path)


def test_padding_is_part_of_the_text_and_cuts_are_told(folder: str) -> None:
    ids, cut = encode("A red  boat", 5, folder)
    assert ids.tolist() == [2, 3, 4, 0, 0] and not cut
    assert encode("a red boat", 3, folder)[0].tolist() == [2, 3, 4] and not encode("a red boat", 3, folder)[1]
    ids, cut = encode("a red boat a", 3, folder)
    assert ids.tolist() == [2, 3, 4] and cut


def test_a_tokenizer_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="a tokenizer at"):
        encode("a", 4, str(tmp_path / "none"))


@pytest.mark.parametrize("text", ["a red box " * 1000, "x" * 10_000, "ein" + "zigwort" * 1428])
def test_an_endless_text_is_cut_and_counted(tmp_path: Path, text: str) -> None:
    make_tokenizer(["a red box"], 64, 16).save_pretrained(tmp_path)
    tokeniser = Tokeniser(16, str(tmp_path), bare=True)
    tokeniser.number(text)
    tokeniser.number("a red box")
    assert tokeniser.truncated == 1 and max(len(ids) for ids in tokeniser.tokens().ids) <= 16
