"""Whether texts and image belong together: BLIP's match head and its contrast, for every text of a pair.

The image is encoded once for all its texts. Texts of one length are computed together, so that no padding enters and
a text's figures don't depend on its batch-mates. A text is cut at the model's length; `cut` counts how many were.
On a CPU grouping takes half the time of texts one by one (BLIP-base, bf16). BLIP: arXiv 2201.12086.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
from pydantic import Field

from filters import blip
from filters.base import Batch, Filter
from filters.weights import blip_hashes, check_blip
from pairs.errors import PairmillError

if TYPE_CHECKING:
    import torch

LONGEST = 10_000  # characters that the tokenizer is given, many times what the model takes


@dataclass(frozen=True)
class BlipMatch(Filter):
    """`probability` that a text matches, in [0, 1], and `cosine`, in [-1, 1]: lists aligned with the texts of `of`,
    joined in its order. Null where a text is missing, and for all texts of an image that doesn't decode. `cut`:
    how many texts were too long."""

    weights: str = "Salesforce/blip-itm-base-coco"
    of: tuple[str, ...] = ("texts", "blip_caption.texts")
    max_tokens: Annotated[int, Field(ge=3)] = 35  # its two marks included
    precision: blip.Precision = "auto"

    version = 2
    columns = {"probability": pa.list_(pa.float32()), "cosine": pa.list_(pa.float32()), "cut": pa.int32()}
    gpu = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "precision", blip.resolved(self.precision))

    @property
    def dtype(self) -> str:
        return self.precision

    @property
    def needs(self) -> tuple[str, ...]:
        return ("pixels", *self.of)

    def content_hashes(self) -> dict[str, str]:
        return blip_hashes(self.weights, blip.MATCHES)

    def check(self) -> None:
        check_blip(self.weights, blip.MATCHES)

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        import torch

        texts = [[text for name in self.of for text in plain(batch[name][row])] for row in range(len(batch))]
        probability: list[list[float | None]] = [[None] * len(row) for row in texts]
        cosine: list[list[float | None]] = [[None] * len(row) for row in texts]
        cut = [0] * len(batch)
        seen = [i for i, image in enumerate(batch.pixels) if image is not None and any(texts[i])]
        places = [(i, j) for i in seen for j, text in enumerate(texts[i]) if text]
        if places:
            model, processor = blip.load(self.weights, blip.MATCHES, self.precision)
            if self.max_tokens > (most := model.config.text_config.max_position_embeddings):
                raise PairmillError(
                    expected=f"blip_match.max_tokens within the match filter's {most} places",
                    found=str(self.max_tokens),
                    remedy="lower max_tokens",
                )
            with torch.inference_mode():
                looks = [image for i in seen if (image := batch.pixels[i]) is not None]
                images = torch.stack(list(blip.encoded(model, processor, looks)))
                ids, long = self.tokens(processor, [str(texts[i][j]) for i, j in places])
                for (i, _), too in zip(places, long, strict=True):
                    cut[i] += too
                index = {row: k for k, row in enumerate(seen)}
                for group in same_length(ids):
                    owner = torch.tensor([index[places[k][0]] for k in group], device=model.device)
                    tokens = torch.tensor([ids[k] for k in group], device=model.device)
                    for k, p, c in zip(group, *measure(model, images[owner], tokens), strict=True):
                        probability[places[k][0]][places[k][1]] = p
                        cosine[places[k][0]][places[k][1]] = c
        return {"probability": probability, "cosine": cosine, "cut": cut}

    def tokens(self, processor: Any, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The ids of each text, and which were cut: these end with their last mark too."""
        ids = processor.tokenizer([text[:LONGEST] for text in texts], verbose=False)["input_ids"]
        long = [len(row) > self.max_tokens for row in ids]
        return [
            [*row[: self.max_tokens - 1], row[-1]] if cut else row for row, cut in zip(ids, long, strict=True)
        ], long


def plain(entries: Sequence[Any] | None) -> list[str | None]:
    """Texts of a cell: a list of strings, or of dicts with `text`; a blank text is None."""
    texts = [entry["text"] if isinstance(entry, Mapping) else entry for entry in entries or []]
    return [text if text and text.strip() else None for text in texts]


def same_length(rows: Sequence[Sequence[int]], at_most: int = 128) -> Iterator[list[int]]:
    """Groups of row numbers with as many tokens each."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        groups[len(row)].append(place)
    for _, places in sorted(groups.items()):
        yield from (places[i : i + at_most] for i in range(0, len(places), at_most))


def measure(model: Any, images: "torch.Tensor", ids: "torch.Tensor") -> tuple[list[float], list[float]]:
    """Probability and cosine of text i with image i, as BlipForImageTextRetrieval computes them; `images` is
    (N, patches, width), `ids` (N, tokens)."""
    cosine = (image_features(model, images) * text_features(model, ids)).sum(-1)
    return match_logits(model, images, ids).softmax(-1)[:, 1].tolist(), cosine.tolist()


def match_logits(model: Any, images: "torch.Tensor", ids: "torch.Tensor") -> "torch.Tensor":
    """(N, 2) float32: what the match head says of text i with image i, no and yes."""
    return model.itm_head(blip.read(model.text_encoder, ids, images)[:, 0]).float()  # type: ignore[no-any-return]


def image_features(model: Any, images: "torch.Tensor") -> "torch.Tensor":
    """(N, E) float32, normalised: the images' side of the contrast."""
    from torch.nn.functional import normalize

    return normalize(model.vision_proj(images[:, 0]).float(), dim=-1)


def text_features(model: Any, ids: "torch.Tensor") -> "torch.Tensor":
    """(N, E) float32, normalised: the texts' side of the contrast."""
    from torch.nn.functional import normalize

    return normalize(model.text_proj(blip.read(model.text_encoder, ids, None)[:, 0]).float(), dim=-1)
