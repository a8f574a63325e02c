"""What the small BLIP learns from: trusted pairs as small pictures in memory, and a tokenizer made of their texts.

Forgotten pairs and the held-out tenth are never among them. Pictures are decoded once, squashed to a square and held as
uint8 (12 kB each at 64 px). They are turned, zoomed and shifted a little, never mirrored or tinted: captions say left
and right, and name colours. Every draw of chance comes from a generator keyed by seed, stage and step, so a resumed
training sees what an unbroken one saw.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V
from transformers import BatchEncoding, BertTokenizerFast

from pairs.errors import PairmillError
from pairs.identity import held_out
from pairs.shard import ShardRef
from pairs.store import Store
from pairs.workspace import Workspace
from training.config import BlipJob
from training.pixels import decode
from training.tables import pinned_table

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]


@dataclass(frozen=True)
class TrustedPairs:
    """`pixels` (N, 3, side, side) uint8, `texts` N, and how many pairs were left out, by reason."""

    pixels: torch.Tensor
    texts: list[str]
    left_out: dict[str, int]

    def __len__(self) -> int:
        return len(self.texts)


def load_pairs(pairs: Iterable[tuple[bytes, str]], side_px: int) -> TrustedPairs:
    """Decodes (encoded image, text) pairs; damaged images and empty texts are left out and counted."""
    pictures: list[torch.Tensor] = []
    texts: list[str] = []
    left_out = {"undecodable": 0, "no_text": 0}
    for data, text in pairs:
        picture = _decode(data, side_px) if text.strip() else None
        if picture is None:
            left_out["undecodable" if text.strip() else "no_text"] += 1
            continue
        pictures.append(picture)
        texts.append(text.strip())
    if len(texts) < 2:
        raise PairmillError(
            expected="at least 2 trusted pairs with an image and a text to train BLIP on",
            found=f"{len(texts)} ({left_out['undecodable']} undecodable images, {left_out['no_text']} empty texts)",
            remedy="add a source with `trusted: true`, or name published weights for blip_caption and blip_match",
        )
    return TrustedPairs(torch.stack(pictures), texts, left_out)


def trusted_pairs(job: BlipJob, counts: Counter[str]) -> Iterator[tuple[bytes, str]]:
    """(encoded image, first text) in order of uid; `counts` gets what is left out: forgotten, held_out, canary."""
    store, apart = Store(job.store), set(job.apart)
    found: list[tuple[str, ShardRef, int, int, str]] = []
    for pin in job.shards:
        table = pinned_table(store, pin)
        columns = (table[name].to_pylist() for name in ("uid", "image_offset", "image_size", "text"))
        for alive, uid, offset, size, text in zip(Workspace(store).alive(table), *columns, strict=True):
            reason = "forgotten" if not alive else "held_out" if held_out(uid) else "canary" if uid in apart else "read"
            counts[reason] += 1
            if reason == "read":
                found.append((uid, pin.ref, offset, size, text or ""))
    for _, ref, offset, size, text in sorted(found, key=lambda pair: pair[0]):
        yield store.read(ref.tar, offset, size), text


def _decode(data: bytes, side_px: int) -> torch.Tensor | None:
    """(3, side, side) uint8 RGB, resized as BlipImageProcessor does it; None where the image is damaged."""
    found = decode(data)
    if found is None:
        return None
    picture = torch.from_numpy(np.ascontiguousarray(found)).permute(2, 0, 1)
    return V.resize(picture, [side_px, side_px], V.InterpolationMode.BICUBIC, antialias=True)


def make_tokenizer(texts: Sequence[str], vocabulary: int, max_tokens: int) -> BertTokenizerFast:
    """A lower-casing WordPiece tokenizer of the most frequent words, at most `vocabulary` pieces in all.

    Any other word is [UNK], one piece long: spelled out, it would be a row of pieces that mean nothing to a model that
    has never met them. [DEC] begins what the decoder writes. The words are counted here, because the tokenizers
    library's trainer breaks ties by chance: two trainings on the same pairs would differ.
    """
    base = BertTokenizerFast().backend_tokenizer
    words = Counter(
        word for text in texts for word, _ in base.pre_tokenizer.pre_tokenize_str(base.normalizer.normalize_str(text))
    )
    often = sorted(words, key=lambda word: (-words[word], word))[: max(0, vocabulary - len(SPECIAL))]
    pieces = [*SPECIAL, *often]
    return BertTokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=max_tokens, bos_token="[DEC]",
        additional_special_tokens=["[ENC]"],
    )  # fmt: skip


def tokens(tokenizer: BertTokenizerFast, texts: Sequence[str], max_tokens: int) -> BatchEncoding:
    """`input_ids` and `attention_mask`, (N, longest) padded, each text within [CLS] and [SEP]."""
    return tokenizer(
        list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt",
        return_token_type_ids=False,
    )  # fmt: skip


def jitter(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(B, 3, side, side) uint8 to float32 in [0, 1], at random turned by up to 9 degrees, zoomed by 0.84 to 1.19 (each
    side by another 6 %) and shifted by up to 9 % of the side. What comes into view has the border's colour."""
    count = len(pixels)
    turn = rng.uniform(-0.16, 0.16, count)
    zoom = np.exp(rng.uniform(-0.17, 0.17, (count, 1)) + rng.uniform(-0.06, 0.06, (count, 2)))
    theta = np.zeros((count, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = np.cos(turn) * zoom[:, 0], -np.sin(turn) * zoom[:, 0]
    theta[:, 1, 0], theta[:, 1, 1] = np.sin(turn) * zoom[:, 1], np.cos(turn) * zoom[:, 1]
    theta[:, :, 2] = rng.uniform(-0.18, 0.18, (count, 2))
    grid = F.affine_grid(torch.from_numpy(theta), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)


def vary(text: str, rng: np.random.Generator, share: float = 0.4) -> str:
    """Part of a caption, among words that mean nothing: web texts say less than captions, in words never met.

    "a red boat to the left of a star" may become "red boat to" or "[UNK] a red boat [UNK] to the left of a star".
    Right and wrong texts are varied alike, so that neither length nor strange words tell them apart.
    """
    words = text.split()
    if rng.random() < share:
        length = int(rng.integers(min(2, len(words)), len(words) + 1))
        start = int(rng.integers(len(words) - length + 1))
        words = words[start : start + length]
    if rng.random() < share:
        for _ in range(int(rng.integers(1, 4))):
            words.insert(int(rng.integers(len(words) + 1)), "[UNK]")
    return " ".join(words)


def same_text(texts: Sequence[str]) -> torch.Tensor:
    """(N, N) bool: which texts say the same, letter case, punctuation and spaces aside."""
    names = [" ".join(re.findall(r"\w+", text.lower())) for text in texts]
    index = torch.tensor([names.index(name) for name in names])
    return index[:, None] == index[None, :]
