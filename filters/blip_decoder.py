"""BLIP's text decoder, one token of many texts a step: slots of a fixed number of images with a fixed number of texts.

The shape of a step never changes, so that the bits of a text don't depend on its batch-mates; an image whose texts have
ended leaves its slot to the next one at once, so that nothing waits for the longest. Keys and values lie in place and
are never moved: `seen` tells which of them a text has behind it (a beam's past is other beams' tokens). Cross-attention
needs no keys and values at all (`filters/blip.py`).
"""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from filters.blip import look

# S slots, G texts of a slot, T places of a text, N patches of an image


class Decoder:
    """The decoder of a BlipForConditionalGeneration over `slots` images, `texts` texts each, of `length` tokens."""

    def __init__(self, model: Any, slots: int, texts: int, length: int) -> None:
        self.text, config = model.text_decoder, model.config.text_config
        self.slots, self.texts, self.length, self.device = slots, texts, length, model.device
        patches, H = model.vision_model.embeddings.num_positions, config.num_attention_heads
        cache = (config.num_hidden_layers, slots, length, texts, H, config.hidden_size // H)
        self.images_SNE = torch.zeros(slots, patches, config.encoder_hidden_size, dtype=model.dtype, device=self.device)
        self.keys, self.values = (torch.zeros(cache, dtype=model.dtype, device=self.device) for _ in range(2))
        self.all = torch.arange(slots, device=self.device)

    def step(self, tokens_SG: torch.Tensor, place_S: torch.Tensor, seen_SGTG: torch.Tensor) -> torch.Tensor:
        """Logits (S, G, vocabulary), fp32, of what follows `tokens`, which stand at `place`. `seen[s, g, t, h]`:
        whether text g attends to the token that text h of its slot has at place t; its own has to be."""
        bert, words = self.text.bert, self.text.bert.embeddings
        mask = (
            torch.zeros_like(seen_SGTG, dtype=self.keys.dtype).masked_fill(~seen_SGTG, -torch.inf).flatten(2)[:, None]
        )
        x = words.LayerNorm(words.word_embeddings(tokens_SG) + words.position_embeddings(place_S)[:, None])
        for layer, keys, values in zip(bert.encoder.layer, self.keys, self.values, strict=True):
            own = layer.attention.self
            q, k, v = (to(x).unflatten(2, (own.num_attention_heads, -1)) for to in (own.query, own.key, own.value))
            keys[self.all, place_S], values[self.all, place_S] = k, v
            q, k, v = (each.transpose(1, 2) for each in (q, keys.flatten(1, 2), values.flatten(1, 2)))
            past = scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = layer.attention.output(past.transpose(1, 2).flatten(2), x)
            x = look(layer.crossattention, x, self.images_SNE)
            x = layer.output(layer.intermediate(x), x)
        return self.text.cls(x).float()  # type: ignore[no-any-return]
