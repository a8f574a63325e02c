"""A caption for each image, written by BLIP's captioner: the synthetic text of CapFilt.

Nucleus sampling as in BLIP (top-p 0.9; arXiv 2201.12086), because beam search writes what is safe and says little new.
The draws of a row are hashes of its uid, so that a caption depends neither on batch-mates nor on the worker. All rows
share the prompt, so nothing is padded. Keys and values are cached. About 2.6 ms an image on one core with the small
BLIP of the default recipe.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from filters import blip
from filters.base import Batch, Filter
from filters.weights import blip_hashes
from pairs.identity import unit_hash

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BlipCaption(Filter):
    """`texts`: the caption in a list of one, without the prompt. `reason` says why there is none: `undecodable`,
    `empty` or `endless` (no end within `max_tokens`); null where there is one. Lengths count tokens after
    the prompt."""

    weights: str = "Salesforce/blip-image-captioning-base"
    prompt: str = "a picture of "
    sample: Literal["nucleus", "greedy"] = "nucleus"
    top_p: float = 0.9
    min_tokens: int = 3
    max_tokens: int = 30
    seed: int = 0

    needs = ("pixels",)
    columns = {"texts": pa.list_(pa.string()), "reason": pa.string()}
    dtype = "fp32"
    gpu = 0.2

    def content_hashes(self) -> dict[str, str]:
        return blip_hashes(self.weights, blip.CAPTIONS)

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        texts: list[list[str] | None] = [None] * len(batch)
        reason: list[str | None] = ["undecodable"] * len(batch)
        seen = [i for i, image in enumerate(batch.pixels) if image is not None]
        if seen:
            model, processor = blip.load(self.weights, blip.CAPTIONS)
            pixels = blip.pictures(processor, [p for p in batch.pixels if p is not None], model.device)
            rows = self.write(model, processor.tokenizer, pixels, [batch.uids[i] for i in seen])
            for i, row in zip(seen, rows, strict=True):
                text = processor.tokenizer.decode(row or [], skip_special_tokens=True).strip()
                reason[i] = "endless" if row is None else None if text else "empty"
                texts[i] = None if reason[i] else [text]
        return {"texts": texts, "reason": reason}

    def write(self, model: Any, tokenizer: Any, pixels: "torch.Tensor", uids: list[str]) -> list[list[int] | None]:
        """New tokens of each image without [SEP]; None where no end was reached."""
        import torch

        end, device = model.config.text_config.sep_token_id, model.device
        ids = tokenizer(self.prompt, return_tensors="pt")["input_ids"][:, :-1].repeat(len(uids), 1).to(device)
        ids[:, 0] = model.config.text_config.bos_token_id
        written: list[list[int]] = [[] for _ in uids]
        open_rows, cache = torch.ones(len(uids), dtype=torch.bool, device=device), None
        with torch.inference_mode():
            images = model.vision_model(pixels)[0]
            for step in range(self.max_tokens):
                out = model.text_decoder(
                    ids, encoder_hidden_states=images, past_key_values=cache, use_cache=True, is_decoder=True,
                    logits_to_keep=1,
                )  # fmt: skip
                cache = out.past_key_values
                ids = self.choose(out.logits[:, -1].float(), uids, step, end)[:, None]
                for row, token in zip(open_rows.nonzero()[:, 0].tolist(), ids[open_rows, 0].tolist(), strict=True):
                    written[row].append(token)
                open_rows &= ids[:, 0] != end
                if not open_rows.any():
                    break
        return [None if still else row[:-1] for row, still in zip(written, open_rows.tolist(), strict=True)]

    def choose(self, logits: "torch.Tensor", uids: list[str], step: int, end: int) -> "torch.Tensor":
        """The next token of each row, (N,), from `logits` (N, vocabulary)."""
        import torch

        if step < self.min_tokens:
            logits[:, end] = -torch.inf
        if self.sample == "greedy":
            return logits.argmax(-1)
        chance, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
        below = chance.cumsum(-1)
        chance = chance.masked_fill(below - chance >= self.top_p, 0.0)
        draws = torch.tensor([unit_hash("caption", self.seed, uid, step) for uid in uids], device=logits.device)
        place = (chance.cumsum(-1) <= draws[:, None] * chance.sum(-1, keepdim=True)).sum(-1)
        return order.gather(-1, place.clamp_max(int(logits.shape[-1]) - 1)[:, None])[:, 0]
