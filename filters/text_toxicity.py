"""How likely the first text is abusive: the linear model of the package alt-profanity-check (TF-IDF over 15,442 English
words, five calibrated SVMs). A word list in effect: quick, English, blind to context.

The package keeps its model in two joblib files, which run code when they are read. They are its own, pinned by the
lock file, and checked here once more: only bytes with the two hashes below are ever unpickled. Importing scikit-learn
takes 3 s, so that happens where there is something to score; then about 0.1 ms a text.
"""

import functools
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
from pydantic import PositiveInt

from filters.base import Batch, Filter
from pairs.errors import PairmillError

PACKAGE = "profanity_check"  # importing it would unpickle at once
VECTORIZER, MODEL = "vectorizer.joblib", "model.joblib"
PINNED = {
    VECTORIZER: "19c5200dc6a41f026e0558e2f164f5fe8d8f58e502b46b37e4385037fcfa4831",
    MODEL: "aeafc04849d4d93db4721cf30a86ebf22085595294b8a07d51918e7fa98f538b",
}


@dataclass(frozen=True)
class TextToxicity(Filter):
    """`probability` that the first `max_chars` characters of the text are abusive, in [0, 1]; null for a blank text."""

    max_chars: PositiveInt = 5000

    needs = ("text",)
    columns = {"probability": pa.float32()}

    def content_hashes(self) -> dict[str, str]:
        return dict(PINNED)

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        texts = {i: text[: self.max_chars] for i, text in enumerate(batch["text"]) if text and text.strip()}
        if not texts:
            return {"probability": [None] * len(batch)}
        vectorizer, model = _load(VECTORIZER), _load(MODEL)
        found = model.predict_proba(vectorizer.transform(texts.values()))[:, 1].tolist()
        values = dict(zip(texts, found, strict=True))
        return {"probability": [values.get(i) for i in range(len(batch))]}


@functools.cache
def _load(name: str) -> Any:
    data = _data(name)
    import joblib

    return joblib.load(io.BytesIO(data))


def _data(name: str) -> bytes:
    """The packaged file's bytes, which are those that are pinned."""
    package = find_spec(PACKAGE)
    assert package is not None and package.origin is not None, f"{PACKAGE} is not installed"
    data = (Path(package.origin).parent / "data" / name).read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != PINNED[name]:
        raise PairmillError(
            expected=f"{name} of alt-profanity-check with sha256 {PINNED[name]}",
            found=f"{found} in version {version('alt-profanity-check')}",
            remedy="install what requirements.lock pins: `make setup`",
        )
    return data
