"""Texts in the form in which copies meet: normalised, cut into overlapping pieces, and sketched by MinHash.

Pieces are 5 characters, not datatrove's 5 words: half of the web's captions have fewer than ten words, so one changed
word would change most of their word 5-grams, and many languages write no spaces. Letters and digits of any script stay
(NFKC, case folded), all else is one space. A piece's hash has 32 bits. All texts of a shard are handled as one array:
about 40 µs a caption of 60 characters, most of it the sketch.
Broder: On the resemblance and containment of documents (1997); 14 buckets of 8 hashes as in datatrove.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

SIZE = 5  # characters of a piece
BUCKETS, ROWS = 14, 8  # texts of Jaccard 0.72 share a bucket with probability one half; of 0.8, 92 %; of 0.9, 99.9 %
MOST_CHARS = 10_000  # of a text that count
CHUNK = 1 << 18  # characters or pieces handled at a time
_chance = np.random.default_rng(2303)
FACTOR_H = _chance.integers(0, 2**64, BUCKETS * ROWS, dtype=np.uint64) | np.uint64(1)
TERM_H = _chance.integers(0, 2**64, BUCKETS * ROWS, dtype=np.uint64)


def normal(text: str | None) -> str:
    """The text without case, marks and punctuation; empty where no letter or digit is left."""
    if not text:
        return ""
    folded = unicodedata.normalize("NFKC", text[:MOST_CHARS]).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip()


def mixed(values: np.ndarray) -> np.ndarray:
    """Spreads uint64 values over all 64 bits (the end of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def digest(text: str | None) -> int | None:
    """64 bits that tell texts apart, never 0; None where there is nothing."""
    found = hashlib.blake2b((text or "").encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(found, "little") or 1) if text else None


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct pieces of each normalised text as hashes (uint32), sorted, one text after another, and the
    offsets where texts begin (one more than there are texts). An empty text has none, a short one has one."""
    batch_N = np.cumsum([len(text) for text in texts], dtype=np.int64) // CHUNK
    edges = [0, *(np.flatnonzero(np.diff(batch_N)) + 1).tolist(), len(texts)]
    found = [_shingles(texts[start:end]) for start, end in pairwise(edges)]
    counts = np.concatenate([counts for _, counts in found])
    return np.concatenate([pieces for pieces, _ in found]), np.concatenate([[0], np.cumsum(counts)])


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    padded = [text.ljust(SIZE, "\0") if text else "" for text in texts]
    length_N = np.array([len(text) for text in padded], np.int64)
    code = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    piece = np.zeros(max(len(code) - SIZE + 1, 0), np.uint64)
    for place in range(SIZE):
        piece = mixed(piece + code[place : place + len(piece)] + np.uint64(0x9E3779B97F4A7C15))
    row = np.repeat(np.arange(len(texts)), length_N)[: len(piece)]
    last = np.cumsum(length_N)[row] - SIZE  # where the row's last piece begins
    inside = np.arange(len(piece)) <= last
    keys = np.unique((row[inside].astype(np.uint64) << np.uint64(32)) | (piece[inside] >> np.uint64(32)))
    return keys.astype(np.uint32), np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))


def sketch(piece_P: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The buckets of each text, (N, BUCKETS) uint32: texts that share one of them may be alike. 0 without pieces."""
    buckets_NB = np.zeros((len(offsets) - 1, BUCKETS), np.uint32)
    holds = np.flatnonzero(np.diff(offsets))
    ends = np.searchsorted(offsets[holds], np.arange(0, len(piece_P) + CHUNK, CHUNK))
    for start, end in pairwise(ends.tolist()):
        if some := holds[start:end].tolist():
            first, last = offsets[some[0]], offsets[some[-1] + 1]
            value = mixed(piece_P[first:last].astype(np.uint64))
            buckets_NB[some] = _buckets(value, offsets[some] - first)
    return buckets_NB


def _buckets(value_P: np.ndarray, starts: np.ndarray) -> np.ndarray:
    found = np.zeros((len(starts), BUCKETS), np.uint64)
    for number, (factor, term) in enumerate(zip(FACTOR_H, TERM_H, strict=True)):
        least = np.minimum.reduceat((value_P * factor + term) >> np.uint64(32), starts)
        bucket = number // ROWS
        found[:, bucket] = mixed(found[:, bucket] + least + np.uint64(number))
    return (found >> np.uint64(32)).astype(np.uint32)


def jaccard(
    piece_P: np.ndarray, offsets: np.ndarray, left: np.ndarray, right: np.ndarray, most: int = 1 << 21
) -> np.ndarray:
    """The shared part of the pieces of the rows `left` and `right`, pair by pair, in [0, 1]; `most` pieces at once."""
    size = np.diff(offsets)
    total = size[left] + size[right]
    found = np.zeros(len(left))
    for some in np.split(np.arange(len(left)), np.flatnonzero(np.diff(np.cumsum(total) // most)) + 1):
        pair = [_gathered(piece_P, offsets, side[some]) for side in (left, right)]
        keys = np.sort(np.concatenate(pair))
        both = (keys[1:][keys[1:] == keys[:-1]] >> np.uint64(32)).astype(np.int64)
        shared = np.bincount(both, minlength=len(some))
        found[some] = shared / np.maximum(total[some] - shared, 1)
    return found


def _gathered(piece_P: np.ndarray, offsets: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The pieces of the rows, each below the number of its row."""
    count = offsets[rows + 1] - offsets[rows]
    number = np.repeat(np.arange(len(rows), dtype=np.uint64), count)
    place = np.arange(len(number)) + np.repeat(offsets[rows] - (np.cumsum(count) - count), count)
    return (number << np.uint64(32)) | piece_P[place]
