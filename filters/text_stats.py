"""Shape of the first text: how long it is, what it is made of, and whether it is an address or a file's name.

Alt texts on the web are often file names, camera counters or addresses. What a text repeats over a whole corpus
(boilerplate) can't be seen in one row; that is a reducer's work. About 10 µs a pair.
DataComp's "basic" set asks for more than 2 words and more than 5 characters (arXiv 2304.14108).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from filters.base import Batch, Filter

URL = re.compile(r"(?:https?://|www\.)\S+|\b[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|info|io|de|fr|co\.uk)\b", re.IGNORECASE)
EXTENSION = re.compile(r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg|avif|heic|ico|psd)$", re.IGNORECASE)
CODE = re.compile(r"[A-Za-z]*[-_ ]?\d{3,}(?:[-_x]\d+)*|[0-9a-fA-F]{16,}")  # IMG_2041, DSC 0031, 800x600, a digest


@dataclass(frozen=True)
class TextStats(Filter):
    """`chars` Unicode code points, `words` whitespace-separated; ratios are of `chars`, in [0, 1]. `file_name` is the
    fraction, in [0, 1], of characters in words that look like a file's name; `has_url` whether an address is there."""

    needs = ("text",)
    columns = {
        "chars": pa.int32(),
        "words": pa.int32(),
        "alnum_ratio": pa.float32(),
        "upper_ratio": pa.float32(),
        "digit_ratio": pa.float32(),
        "file_name": pa.float32(),
        "has_url": pa.bool_(),
    }

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        rows = [measure(text) if text is not None else {} for text in batch["text"]]
        return {name: [row.get(name) for row in rows] for name in self.columns}


def measure(text: str) -> dict[str, Any]:
    """All columns of one text. Ratios of an empty text can't be measured: they are left out."""
    counts = {"chars": len(text), "words": len(text.split()), "has_url": URL.search(text) is not None}
    if not text.strip():
        return counts
    return counts | {
        "alnum_ratio": sum(map(str.isalnum, text)) / len(text),
        "upper_ratio": sum(map(str.isupper, text)) / len(text),
        "digit_ratio": sum(map(str.isdigit, text)) / len(text),
        "file_name": file_name_fraction(text),
    }


def file_name_fraction(text: str) -> float:
    """1.0 for "IMG_2041.JPG", 0.0 for "a red boat", 14/18 for "boat photo_0031.png"; `text` is not blank."""
    words = text.split()
    return sum(len(word) for word in words if _like_file_name(word)) / sum(map(len, words))


def _like_file_name(word: str) -> bool:
    if EXTENSION.search(word) or CODE.fullmatch(word):
        return True
    return "_" in word.strip("_") or (word.count("-") >= 2 and any(map(str.isdigit, word)))
