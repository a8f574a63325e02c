"""A small BLIP, trained on the trusted pairs: a captioner, and a filter that tells whether image and text match.

Both are transformers' own classes with transformers' own heads and losses, saved in its format. They begin from one short
captioning run and are then trained apart, as in BLIP: with shared parameters the filter believes what the
captioner writes (arXiv 2201.12086, section 4.4). Captioner: language modelling. Filter: contrast (ITC) and matching (ITM)
against hard negatives, drawn from the batch by the contrast's own similarity.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertTokenizerFast, BlipConfig, BlipForConditionalGeneration, BlipForImageTextRetrieval,
    BlipImageProcessor, BlipProcessor,
)  # fmt: skip

from pairs.recipe import BlipSpec
from training.blip_data import TrustedPairs, jitter, load_pairs, make_tokenizer, same_text, tokens, vary

Progress = Callable[[dict[str, object]], None]
CAPTIONER, MATCHER = "captioner", "matcher"


@dataclass(frozen=True)
class BlipModels:
    """Folders that `from_pretrained` loads."""

    captioner: Path
    matcher: Path


def blip_config(spec: BlipSpec, tokenizer: BertTokenizerFast) -> BlipConfig:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": spec.text.width, "intermediate_size": 4 * spec.text.width,
        "num_hidden_layers": spec.text.layers, "num_attention_heads": spec.text.heads,
        "max_position_embeddings": max(64, 2 * spec.max_tokens), "label_smoothing": 0.1,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id,
    }  # fmt: skip
    vision = {
        "image_size": spec.image_px, "patch_size": spec.patch_px, "hidden_size": spec.vision.width,
        "intermediate_size": 4 * spec.vision.width, "num_hidden_layers": spec.vision.layers,
        "num_attention_heads": spec.vision.heads, "initializer_range": 0.02,
    }  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=spec.embed_dim)


@dataclass(frozen=True)
class Learner:
    """What every loss reads."""

    pairs: TrustedPairs
    tokenizer: BertTokenizerFast
    spec: BlipSpec
    mean: torch.Tensor
    std: torch.Tensor

    def pictures(self, index: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        return jitter(self.pairs.pixels[torch.from_numpy(index)], rng, self.mean, self.std)


Losses = Callable[[nn.Module, Learner, np.ndarray, np.random.Generator], dict[str, torch.Tensor]]


def caption_losses(model: nn.Module, learner: Learner, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Language modelling: cross-entropy of the caption after the prompt, label smoothing 0.1."""
    prompt = learner.spec.prompt
    texts = [prompt + learner.pairs.texts[i] for i in index]
    batch = tokens(learner.tokenizer, texts, learner.spec.max_tokens)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    ids[:, 0] = learner.tokenizer.bos_token_id
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : 1 + len(learner.tokenizer.tokenize(prompt))] = -100
    pixels = learner.pictures(index, rng)
    return {"lm": model(pixel_values=pixels, input_ids=ids, attention_mask=mask, labels=labels).loss}


def match_losses(model: nn.Module, learner: Learner, index: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Contrast over the batch, and matching of each image with its text and with `negatives` others."""
    spec, count = learner.spec, len(index)
    plain = [learner.pairs.texts[i] for i in index]
    texts = [vary(text, rng) for text in plain]
    batch = tokens(learner.tokenizer, texts, spec.max_tokens)
    states = model.vision_model(learner.pictures(index, rng)).last_hidden_state
    alone = model.text_encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    image = F.normalize(model.vision_proj(states[:, 0]).float(), dim=-1)
    text = F.normalize(model.text_proj(alone[:, 0]).float(), dim=-1)
    same = same_text(plain)
    logits = (image @ text.T / spec.temperature).masked_fill(same & ~torch.eye(count, dtype=torch.bool), -1e4)
    target = torch.arange(count)
    itc = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    wrong = hard_negatives(logits.detach(), same, spec.negatives, rng)
    owner = torch.arange(count).repeat(1 + wrong.shape[1])
    chosen = torch.cat([torch.arange(count), wrong.T.reshape(-1)])
    score = match_scores(model, states[owner], batch["input_ids"][chosen], batch["attention_mask"][chosen])
    truth = (torch.arange(len(owner)) < count).long()
    return {"itc": itc, "itm": F.cross_entropy(score.float(), truth)}


def match_scores(model: nn.Module, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits (N, 2) of the match head, as BlipForImageTextRetrieval computes them, for images encoded already."""
    fused = model.text_encoder(ids, attention_mask=mask, encoder_hidden_states=states).last_hidden_state
    return model.itm_head(fused[:, 0])


def hard_negatives(logits: torch.Tensor, same: torch.Tensor, count: int, rng: np.random.Generator) -> torch.Tensor:
    """(B, count) indices of texts that don't belong, the likelier the more similar they seem; equal texts never."""
    weights = F.softmax(logits.float(), dim=1).clamp_min(1e-6).masked_fill(same, 0.0)
    count = min(count, int((weights > 0).sum(1).min()))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return torch.multinomial(weights, count, generator=generator) if count else torch.empty(len(same), 0, dtype=torch.long)
