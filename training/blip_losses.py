"""What the small BLIP is taught by: words, then captions (LM) or matching (ITC and ITM), with transformers' own heads.

`word_loss` comes first, on the image tower that captioner and filter both begin from: every patch is compared with
every word, and a caption's words must be found in some patch (pooled by log-sum-exp). It teaches patches the words'
own embeddings at a fraction of the cost of a text tower, which hundreds of pairs are too few for. In `match_loss`
every token of a text also tells whether its word is true of the image: a dozen labels a text instead of one.
Words as labels: CatLIP, arXiv 2404.15653. BLIP's losses: arXiv 2201.12086.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertTokenizerFast

from pairs.pretrain import BlipSpec
from training.blip_data import TrustedPairs, jitter, same_text, tokens, vary

EVEN = 0.5  # of the negatives that are drawn whatever they seem
Parts = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Lesson:
    """What every loss reads. `mean` and `std` (3, 1, 1) normalise pixels in [0, 1]."""

    pairs: TrustedPairs
    tokenizer: BertTokenizerFast
    spec: BlipSpec
    mean: torch.Tensor
    std: torch.Tensor
    words: torch.Tensor  # (N, vocabulary) float32: which pieces each text holds

    def pictures(self, index: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return (jitter(self.pairs.pixels[torch.from_numpy(index)], rng) - self.mean) / self.std


def pieces_held(texts: list[str], tokenizer: BertTokenizerFast) -> torch.Tensor:
    """(N, vocabulary) float32: 1 where the text holds the piece."""
    held = torch.zeros(len(texts), len(tokenizer))
    for row, ids in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
        held[row, ids] = 1.0
    return held


Losses = Callable[[nn.Module, Lesson, np.ndarray, np.random.Generator], Parts]


class WordReader(nn.Module):
    """An image tower, and the word embeddings that its patches are compared with."""

    def __init__(self, vision: nn.Module, embeddings: nn.Embedding, words: torch.Tensor) -> None:
        super().__init__()
        self.vision, self.embeddings, self.words = vision, embeddings, words
        share = words.mean(0).clamp(1e-3, 1 - 1e-3)
        self.used = words.any(0)
        self.bias = nn.Parameter(torch.logit(share))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (B, vocabulary) of each word being said."""
        patches = self.vision(pixels).last_hidden_state[:, 1:]
        likeness = (patches @ self.embeddings.weight.T).float() * self.scale.exp()
        return torch.logsumexp(likeness, dim=1) - float(np.log(likeness.shape[1])) + self.bias


def word_loss(model: nn.Module, lesson: Lesson, index: np.ndarray, rng: np.random.Generator) -> Parts:
    """Binary cross-entropy of each word of the vocabulary that any text holds, summed over words."""
    logits = model(lesson.pictures(index, rng))
    truth = model.words[torch.from_numpy(index)]
    each = F.binary_cross_entropy_with_logits(logits[:, model.used], truth[:, model.used], reduction="none")
    return {"words": each.sum(1).mean()}


def caption_loss(model: nn.Module, lesson: Lesson, index: np.ndarray, rng: np.random.Generator) -> Parts:
    """Language modelling: cross-entropy of the caption after the prompt, with the config's label smoothing."""
    prompt = lesson.spec.prompt
    batch = tokens(lesson.tokenizer, [prompt + lesson.pairs.texts[i] for i in index], lesson.spec.max_tokens)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[:, 0] = lesson.tokenizer.bos_token_id
    labels = ids.masked_fill((mask == 0) | (ids == lesson.tokenizer.unk_token_id), -100)
    labels[:, : 1 + len(lesson.tokenizer.tokenize(prompt))] = -100
    pixels = lesson.pictures(index, rng)
    return {"lm": model(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels).loss}


def match_loss(model: nn.Module, lesson: Lesson, index: np.ndarray, rng: np.random.Generator) -> Parts:
    """Contrast over the batch, and matching of each image with its own text and with `negatives` others."""
    spec, own = lesson.spec, torch.arange(len(index))
    whole = [lesson.pairs.texts[i] for i in index]
    batch = tokens(lesson.tokenizer, [vary(text, rng) for text in whole], spec.max_tokens)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = model.vision_model(lesson.pictures(index, rng)).last_hidden_state
    alone = model.text_encoder(ids, attention_mask=mask).last_hidden_state
    image = F.normalize(model.vision_proj(states[:, 0]).float(), dim=-1)
    text = F.normalize(model.text_proj(alone[:, 0]).float(), dim=-1)
    same = same_text(whole)
    logits = (image @ text.T / spec.temperature).masked_fill(same & ~torch.eye(len(own), dtype=torch.bool), -1e4)
    wrong = hard_negatives(logits.detach(), same, spec.negatives, rng)
    owner, chosen = own.repeat(1 + wrong.shape[1]), torch.cat([own, wrong.T.reshape(-1)])
    score = match_scores(model, states[owner], ids[chosen], mask[chosen]).float()
    true = torch.arange(len(owner)) < len(own)
    said = lesson.words[torch.from_numpy(index)[owner]].gather(1, ids[chosen]).long()
    told = lesson.words.any(0)[ids[chosen]] & (mask[chosen] > 0)
    return {
        "itc": (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2,
        "itm": F.cross_entropy(score[:, 0], true.long(), weight=torch.tensor([1.0, spec.positive_weight])),
        "words": F.cross_entropy(score[told], said[told]),
    }


def match_scores(model: nn.Module, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits (N, tokens, 2) of the match head, for encoded images (N, patches, width). Those of the first token are
    what BlipForImageTextRetrieval returns."""
    fused = model.text_encoder(ids, attention_mask=mask, encoder_hidden_states=states).last_hidden_state
    return model.itm_head(fused)  # type: ignore[no-any-return]


def hard_negatives(logits: torch.Tensor, same: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """(B, count) rows of texts that don't belong, equal texts never. Half the chance lies on those that seem similar,
    as in BLIP, and half on any: what is hard today must not be all that is learned in a short training."""
    free = (~same).float()
    weights = (1 - EVEN) * F.softmax(logits.masked_fill(same, -1e4), dim=1) + EVEN * free / free.sum(
        1, keepdim=True
    ).clamp_min(1)
    weights = weights.masked_fill(same, 0.0)
    count = min(count, int((weights > 0).sum(1).min()))
    if count == 0:
        return torch.empty(len(same), 0, dtype=torch.long)
    return torch.multinomial(weights, count, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
