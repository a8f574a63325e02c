"""CIDEr-D of captions (arXiv 1411.5726), by pycocoevalcap: agreement of n-grams weighed by how rare they are.

COCO's own evaluation splits words by Stanford's PTB tokenizer, which needs Java; here they are lower-cased and split as
BERT does, and what holds no letter or digit is dropped. Values go from 0 to 10 for captions equal to their one
reference; the literature writes 1.278 as 127.8. How rare an n-gram is, is counted over the references given, so values
of different sets don't compare, and below three images there is nothing to count.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocoevalcap.cider.cider import Cider
from tokenizers.pre_tokenizers import BertPreTokenizer

FEWEST = 3
Z = 1.959964  # of a 95 % interval
SPLIT = BertPreTokenizer()


def words(text: str) -> list[str]:
    """`A red box, isn't it?` → a red box isn t it."""
    return [word for word, _ in SPLIT.pre_tokenize_str(text.lower()) if any(map(str.isalnum, word))]


def cider(captions: Sequence[str | None], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Mean CIDEr-D of each image's caption against its references, as {value, low, high, n}; no caption counts 0. An
    image whose references hold no word is left out.

    The interval is that of the mean over the n images, with the frequencies as they are. Nulls below `FEWEST` images.
    """
    right = {i: own for i, texts in enumerate(references) if (own := [" ".join(w) for w in map(words, texts) if w])}
    if len(right) < FEWEST:
        return {"value": None, "low": None, "high": None, "n": len(right)}
    said = {i: [" ".join(words(captions[i] or ""))] for i in right}
    return mean(Cider().compute_score(right, said)[1], 10.0)


def mean(values: Sequence[float], most: float = math.inf) -> dict[str, Any]:
    """{value, low, high, n} of figures in [0, most]; without an interval for one, nulls for none."""
    value = float(np.mean(values)) if len(values) else None
    half = Z * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    ends = (None, None) if value is None or half is None else (max(0.0, value - half), min(most, value + half))
    return {"value": value, "low": ends[0], "high": ends[1], "n": len(values)}
