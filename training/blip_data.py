"""What the small BLIP learns from: trusted pairs as small pictures in memory, and a tokenizer made of their texts.

Pictures are decoded once, squashed to a square and held as uint8 (12 kB each at 64 px). They are jittered by small
zooms and shifts only: captions say left and right, and name colours, so nothing is mirrored or tinted. Every draw of chance
comes from a generator keyed by (seed, what for, step), so a resumed training sees what an unbroken one saw.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as V
from transformers import BatchEncoding, BertTokenizerFast

from pairs.errors import PairmillError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
LETTERS = np.array(list("abcdefghijklmnopqrstuvwxyz"))


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


def _decode(data: bytes, side_px: int) -> torch.Tensor | None:
    """(3, side, side) uint8 RGB, resized as BlipImageProcessor does it; None where the image is damaged."""
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if found is None:
        return None
    picture = torch.from_numpy(np.ascontiguousarray(found[:, :, ::-1])).permute(2, 0, 1)
    return V.resize(picture, [side_px, side_px], V.InterpolationMode.BICUBIC, antialias=True)


def make_tokenizer(texts: Sequence[str], vocabulary: int, max_tokens: int) -> BertTokenizerFast:
    """A lower-casing WordPiece tokenizer of at most `vocabulary` pieces. [DEC] begins what the decoder writes."""
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = [*LETTERS, *"0123456789", *".,;:!?'-()"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator([*sorted(texts), " ".join(LETTERS), "".join(LETTERS)], trainer)
    pieces = learner.get_vocab()
    continued = [f"##{c}" for c in alphabet if f"##{c}" not in pieces]
    pieces |= {piece: len(pieces) + i for i, piece in enumerate(continued)}
    return BertTokenizerFast(
        vocab=pieces, model_max_length=max_tokens, bos_token="[DEC]", additional_special_tokens=["[ENC]"]
    )


def tokens(tokenizer: BertTokenizerFast, texts: Sequence[str], max_tokens: int) -> BatchEncoding:
    """`input_ids` and `attention_mask`, (N, longest) padded, each text within [CLS] and [SEP]."""
    return tokenizer(
        list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt",
        return_token_type_ids=False,
    )  # fmt: skip


def jitter(pixels: torch.Tensor, rng: np.random.Generator, strength: float = 1.0) -> torch.Tensor:
    """(B, 3, side, side) uint8 to float32 in [0, 1], at random turned by up to 15 degrees, zoomed by 0.75 to 1.33 and
    shifted by up to 15 % of the side, each times `strength`. The border's colour fills what comes into view."""
    count = len(pixels)
    turn = rng.uniform(-0.26, 0.26, count) * strength
    zoom = np.exp(rng.uniform(-0.29, 0.29, (count, 1)) * strength + rng.uniform(-0.1, 0.1, (count, 2)) * strength)
    theta = np.zeros((count, 2, 3), np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = np.cos(turn) * zoom[:, 0], -np.sin(turn) * zoom[:, 0]
    theta[:, 1, 0], theta[:, 1, 1] = np.sin(turn) * zoom[:, 1], np.cos(turn) * zoom[:, 1]
    theta[:, :, 2] = rng.uniform(-0.3, 0.3, (count, 2)) * strength
    grid = F.affine_grid(torch.from_numpy(theta), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)


def vary(text: str, rng: np.random.Generator, share: float = 0.5) -> str:
    """Part of a caption, among words that mean nothing: web texts say less than captions, in words never met.

    "a red boat to the left of a star" may become "red boat to" or "qev a red boat ljto to the left of a star".
    Right and wrong texts are varied alike, so that neither length nor strange words tell them apart.
    """
    words = text.split()
    if rng.random() < share:
        length = int(rng.integers(min(2, len(words)), len(words) + 1))
        start = int(rng.integers(len(words) - length + 1))
        words = words[start : start + length]
    if rng.random() < share:
        for _ in range(int(rng.integers(1, 4))):
            words.insert(int(rng.integers(len(words) + 1)), _strange_word(rng))
    return " ".join(words)


def _strange_word(rng: np.random.Generator) -> str:
    return "".join(rng.choice(LETTERS, int(rng.integers(2, 9))))


def same_text(texts: Sequence[str]) -> torch.Tensor:
    """(N, N) bool: which texts say the same, letter case, punctuation and spaces aside."""
    names = [" ".join(re.findall(r"\w+", text.lower())) for text in texts]
    index = torch.tensor([names.index(name) for name in names])
    return index[:, None] == index[None, :]
