"""Shape of the first text: how long it is, what it is made of, what it repeats, and whether it is an address, a file's
name or a phrase that web pages put beside any image.

Alt texts on the web are often file names, camera counters or addresses. What a text repeats over a whole corpus can't
be seen in one row; that is a reducer's work. Every letter is looked up once in a table of classes, and no pattern
searches twice over the same letters: about 12 µs a caption, 3 ms for 10,000 letters, whatever they are.
DataComp's "basic" set asks for more than 2 words and more than 5 characters (arXiv 2304.14108). `alnum_ratio`,
`char_repetition` and `word_repetition` are data-juicer's (arXiv 2309.02033), so that equal thresholds decide alike.
"""

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import PositiveInt

from filters.base import Batch, Filter
from filters.text_classes import CLASSES, SPECIAL, boilerplate_fraction

MAX_CHARS = 20_000  # all but the counts look at so many: sources cut texts at 10,000
SHORT = 400  # characters in which a search from every few places is faster than counting
ADDRESS = re.compile(r"https?://\S|www\.\S|[\w-]\.(?:com|net|org|info|io|de|fr|co\.uk)\b", re.IGNORECASE)
EMAIL = re.compile(r"[\w.+-]@[\w-]+\.[\w-]")
PHONE = re.compile(r"(?<![\w.,/-])\+?(?:\(\d{1,5}\)|\d{1,5})[ ./-][\d ()./-]{4,20}\d(?![\w/])|(?<!\w)\+\d{9,15}\b")
DATE = re.compile(r"(?:19|20)\d\d[-./ ]\d\d?[-./ ]\d\d?|\d\d?[-./ ]\d\d?[-./ ](?:19|20)\d\d")
EXTENSION = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic|ico|psd)$", re.IGNORECASE)
MARKS = string.punctuation + string.digits + string.whitespace
CODE = re.compile(r"[A-Za-z]*[-_ ]?\d{3,}(?:[-_x]\d+)*|[0-9a-fA-F]{16,}")  # IMG_2041, DSC 0031, 800x600, a digest
RATIOS = ("alnum_ratio", "upper_ratio", "digit_ratio", "special_ratio", "file_name", "boilerplate")
REPETITIONS = ("char_repetition", "word_repetition")
FLAGS = ("has_url", "has_email", "has_phone")


@dataclass(frozen=True)
class TextStats(Filter):
    """`chars` Unicode code points, `words` whitespace-separated; ratios are of `chars`, in [0, 1], `special_ratio` of
    what is neither letter nor accent. `file_name` is the fraction of characters in words that look like a file's name,
    `boilerplate` that of words in phrases that say nothing of any image ("click here"), `has_*` whether one is there.

    `char_repetition` and `word_repetition`, in [0, 1]: the share of n-grams that occur more than once, of `char_gram`
    characters (only the √N commonest count) and `word_gram` words.
    """

    char_gram: PositiveInt = 10
    word_gram: PositiveInt = 10

    version = 2
    needs = ("text",)
    columns = (
        {"chars": pa.int32(), "words": pa.int32()}
        | dict.fromkeys((*RATIOS, *REPETITIONS), pa.float32())
        | dict.fromkeys(FLAGS, pa.bool_())
    )

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        rows = [{} if text is None else measure(text, self.char_gram, self.word_gram) for text in batch["text"]]
        return {name: [row.get(name) for row in rows] for name in self.columns}


def measure(text: str, char_gram: int = 10, word_gram: int = 10) -> dict[str, Any]:
    """All columns of one text. Ratios of an empty text can't be measured: they are left out."""
    counts: dict[str, Any] = {"chars": len(text), "words": count_words(text)}
    text = text[:MAX_CHARS]
    classes = text.translate(CLASSES)
    digits = classes.count("D")
    counts |= {
        "has_url": ("." in text or "://" in text) and ADDRESS.search(text) is not None,
        "has_email": "@" in text and EMAIL.search(text) is not None,
        "has_phone": digits >= 9 and any(map(_is_phone, PHONE.finditer(text))),
        "char_repetition": char_repetition(text, char_gram),
        "word_repetition": word_repetition(text, word_gram) if counts["words"] > word_gram else 0.0,
    }
    if not text.strip():
        return counts
    upper, letters, others = classes.count("U"), classes.count("L"), classes.count("N")
    return counts | {
        "alnum_ratio": (upper + letters + digits + others) / len(text),
        "upper_ratio": upper / len(text),
        "digit_ratio": digits / len(text),
        "special_ratio": (classes.count(SPECIAL) + digits + others) / len(text),
        "file_name": file_name_fraction(text),
        "boilerplate": boilerplate_fraction(text),
    }


def count_words(text: str) -> int:
    """Whitespace-separated words, piece by piece: the words of 100 MB take a gigabyte otherwise."""
    pieces = range(0, len(text), MAX_CHARS)
    cut = sum(not text[i - 1].isspace() and not text[i].isspace() for i in pieces[1:])
    return sum(len(text[i : i + MAX_CHARS].split()) for i in pieces) - cut


def char_repetition(text: str, gram: int) -> float:
    """Of "abcabcabc" and 3 characters: abc three times, bca and cab twice; √3 allows one of them: 3 / 7."""
    if len(text) <= SHORT and not _repeats(text, gram):
        return 0.0
    grams = [text[i : i + gram] for i in range(len(text) - gram + 1)]
    counts = Counter(grams)
    often = sorted((n for n in counts.values() if n > 1), reverse=True)
    return sum(often[: math.isqrt(len(counts))]) / max(1, len(grams))


def _repeats(text: str, gram: int) -> bool:
    """Whether any run of `gram` characters can occur twice: every such run holds one of the shorter runs that begin at
    each `step`th place, and that one would occur again later."""
    step = (gram + 1) // 2
    places = range(0, len(text) - gram + step, step)
    return any(text.find(text[i : i + gram - step + 1], i + 1) >= 0 for i in places)


def word_repetition(text: str, gram: int) -> float:
    """Of "a b a b" and 2 words: "a b" twice, "b a" once: 2 / 3. Case, and what isn't a letter at a word's ends, are
    left out."""
    split = re.split("[ \n\t]+", text.lower())
    words = [word for word in map(_bare, split) if word]
    if len(words) - len(set(words)) < gram:  # the later one of two equal n-grams has only words that were there before
        return 0.0
    return _repeated(zip(*(itertools.islice(words, i, None) for i in range(gram)), strict=False))


def _repeated(grams: Iterable[Hashable]) -> float:
    counts = Counter(grams)
    return sum(n for n in counts.values() if n > 1) / max(1, counts.total())


def _bare(word: str) -> str:
    """The word without what isn't a letter at its ends."""
    word = word.strip(MARKS)
    if not word or word.isalpha():
        return word
    classes = word.translate(CLASSES).translate({ord("D"): SPECIAL, ord("N"): SPECIAL})
    return word[len(word) - len(classes.lstrip(SPECIAL)) : len(classes.rstrip(SPECIAL))]


def _is_phone(found: re.Match[str]) -> bool:
    """Nine to fifteen digits (after + seven are enough) in three groups, or after +, ( or 0; no date begins them."""
    number = found[0]
    digits, groups = sum(map(str.isdigit, number)), len(re.findall(r"\d+", number))
    named = number[0] in "+(0" or groups >= 3
    return named and (7 if number[0] == "+" else 9) <= digits <= 15 and not DATE.match(number)


def file_name_fraction(text: str) -> float:
    """1.0 for "IMG_2041.JPG", 0.0 for "a red boat", 14/18 for "boat photo_0031.png"; `text` is not blank."""
    words = text.split()
    return sum(len(word) for word in words if _like_file_name(word)) / sum(map(len, words))


def _like_file_name(word: str) -> bool:
    if len(word) < 3 or (len(word) < 16 and word.isalpha()):
        return False
    if EXTENSION.search(word) or CODE.fullmatch(word):
        return True
    return "_" in word.strip("_") or (word.count("-") >= 2 and any(map(str.isdigit, word)))
