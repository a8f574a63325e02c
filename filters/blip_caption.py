"""Captions for each image, written by BLIP's captioner: the synthetic texts of CapFilt.

Nucleus sampling as in BLIP (top-p 0.9; arXiv 2201.12086), because beam search writes what is safe and says little new.
The draws of a caption are hashes of its uid and number, and all that is computed has one fixed shape, so that a caption
depends neither on batch-mates nor on the worker, in bf16 too. An image is encoded once for all its captions.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from filters import blip
from filters.base import Batch, Filter
from filters.weights import blip_hashes, check_blip
from pairs.errors import PairmillError
from pairs.identity import unit_hash

if TYPE_CHECKING:
    import torch

TEXTS = {"cpu": 16, "cuda": 256}  # written at once; by a narrow model, whose calls cost most, four times as many
NARROW = 256


@dataclass(frozen=True)
class BlipCaption(Filter):
    """`texts`: the captions without the prompt; of beams the best `captions`, best first. `reason` says why there
    isn't one, or not as many: `undecodable`, `empty` or `endless` (no end within `max_tokens`). Lengths count tokens
    after the prompt, [SEP] too.

    `precision: auto` is bf16 where this machine's GPU or CPU multiplies it, else fp32; it becomes part of the
    fingerprint as what it is. Beams are those of transformers' `generate`.
    """

    weights: str = "Salesforce/blip-image-captioning-base"
    prompt: str = "a picture of "
    sample: Literal["nucleus", "greedy", "beam"] = "nucleus"
    captions: int = 1
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    beams: Annotated[int, Field(ge=1)] = 3
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    early_stopping: bool = False
    min_tokens: int = 3
    max_tokens: Annotated[int, Field(ge=1)] = 30
    precision: blip.Precision = "auto"
    seed: int = 0

    version = 2
    needs = ("pixels",)
    columns = {"texts": pa.list_(pa.string()), "reason": pa.string()}
    gpu = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", blip.resolved(self.precision))
        most = {"greedy": 1, "beam": self.beams, "nucleus": 100}[self.sample]
        if not 1 <= self.captions <= most or not 0 <= self.min_tokens <= self.max_tokens:
            raise PairmillError(
                expected=f"1 to {most} captions by {self.sample}, and 0 <= min_tokens <= max_tokens",
                found=f"captions {self.captions}, min_tokens {self.min_tokens}, max_tokens {self.max_tokens}",
                remedy="several captions come of `sample: nucleus`, or of as many `beams`",
            )

    @property
    def dtype(self) -> str:
        return self.precision

    def content_hashes(self) -> dict[str, str]:
        return blip_hashes(self.weights, blip.CAPTIONS)

    def check(self) -> None:
        check_blip(self.weights, blip.CAPTIONS)

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        texts: list[list[str] | None] = [None] * len(batch)
        reason: list[str | None] = ["undecodable"] * len(batch)
        seen = [i for i, image in enumerate(batch.pixels) if image is not None]
        if seen:
            model, processor = blip.load(self.weights, blip.CAPTIONS, self.precision)
            images = blip.encoded(model, processor, [p for p in batch.pixels if p is not None])
            rows = self.write(model, processor.tokenizer, images, [batch.uids[i] for i in seen])
            for i, row in zip(seen, rows, strict=True):
                plain = [processor.tokenizer.decode(t or [], skip_special_tokens=True).strip() for t in row]
                whys = ["endless" if t is None else "empty" for t, text in zip(row, plain, strict=True) if not text]
                texts[i], reason[i] = [text for text in plain if text] or None, next(iter(whys), None)
        return {"texts": texts, "reason": reason}

    def write(
        self, model: Any, tokenizer: Any, images: "Iterator[torch.Tensor]", uids: list[str]
    ) -> list[list[list[int] | None]]:
        """New tokens of each image's captions without [SEP]; None where no end was reached."""
        from filters import blip_search
        from filters.blip_decoder import Decoder

        config = model.config.text_config
        prompt = [config.bos_token_id, *tokenizer(self.prompt)["input_ids"][1:-1]]
        length, end = len(prompt) + self.max_tokens - 1, config.sep_token_id
        if length > config.max_position_embeddings:
            raise PairmillError(
                expected=f"prompt and captions within the captioner's {config.max_position_embeddings} places",
                found=f"{len(prompt)} of the prompt, {self.max_tokens} of max_tokens",
                remedy="lower max_tokens or shorten the prompt",
            )
        pick, start = self.search(blip_search, end)
        texts = self.beams if self.sample == "beam" else self.captions
        searches = [start(uid) for uid in uids]
        rows = TEXTS[model.device.type] * (4 if config.hidden_size < NARROW else 1)
        decoder = Decoder(model, max(1, rows // texts), texts, length)
        blip_search.write(decoder, images, prompt, searches, pick, self.min_tokens, end)
        return [one.found() for one in searches]

    def search(self, how: Any, end: int) -> tuple[Any, Callable[[str], Any]]:
        """What picks for all images, and what begins an image's search by its uid."""
        if self.sample == "beam":
            beams = (self.beams, self.captions, self.max_tokens, end, self.length_penalty, self.early_stopping)
            return how.pick_beams, lambda uid: how.Beams(*beams)
        draw = functools.partial(unit_hash, "caption", self.seed)
        pick = (
            how.pick_likeliest
            if self.sample == "greedy"
            else functools.partial(how.pick_from_nucleus, top_p=self.top_p)
        )
        return pick, lambda uid: how.Samples(self.captions, self.max_tokens, end, functools.partial(draw, uid))
