"""A tiny BLIP of random weights as transformers makes it, with a tokenizer of a few words, and packed inputs for it."""

from pathlib import Path
from typing import Any

import torch
import transformers

from training import blip_export
from training.models.blip import PackedBlip, Sizes
from training.packing import PackedImages, pack_images

SIZES = Sizes(32, 8, (2, 32, 2), (3, 48, 4), 16, 40, 24)
WORDS = ["a", "red", "green", "blue", "yellow", "box", "star", "boat", "left", "right", "of", "the", "in", "on", "and",
         "small", "large", "picture", "two", "three"]  # fmt: skip
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
TEXTS = ["a red box", "a small blue boat left of the star", "star", "two large boat and three small box in a picture",
         "a green star", "the yellow box on the right"]  # fmt: skip


def processor(plain: bool = False) -> Any:
    """Plain: without BLIP's marks, as the published ones have it: these are the last numbers of the vocabulary."""
    pieces = [*SPECIAL, *WORDS, *(f"extra{i}" for i in range(SIZES.vocabulary - len(SPECIAL) - len(WORDS)))]
    pieces = [piece for piece in pieces if piece not in SPECIAL[5:]] if plain else pieces
    marks = {} if plain else {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}
    tokenizer = transformers.BertTokenizerFast(
        vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=24, **marks
    )
    images = transformers.BlipImageProcessor(size={"height": SIZES.image_px, "width": SIZES.image_px})
    return transformers.BlipProcessor(images, tokenizer)


def theirs(architecture: str, seed: int = 0, **settings: Any) -> Any:
    """transformers' model with weights far from where they start, so that nothing cancels."""
    config = blip_export.config(SIZES, processor().tokenizer, **settings)
    model = getattr(transformers, architecture)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            norm = value.ndim == 1 and name.endswith("weight")
            value.copy_(0.15 * torch.randn(value.shape, generator=generator) + float(norm))
    return model


def folder(path: Path, architecture: str, plain: bool = False, **settings: Any) -> Path:
    model = theirs(architecture, **settings)
    if plain:
        model.config.text_config.bos_token_id = SIZES.vocabulary - 2
    model.save_pretrained(path)
    processor(plain).save_pretrained(path)
    return path


def pixels(count: int, seed: int = 1) -> torch.Tensor:
    """(count, 3, side, side), normalised."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def packed(pictures: torch.Tensor) -> PackedImages:
    """Each picture as its patches in row-major order."""
    side = SIZES.patch_px
    patches = torch.nn.functional.unfold(pictures, side, stride=side).transpose(1, 2)
    return pack_images(list(patches), [(4, 4)] * len(pictures))


def ids(texts: list[str]) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in processor().tokenizer(texts)["input_ids"]]


def padded(texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(processor().tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False))


def tiny(seed: int = 3) -> PackedBlip:
    """Ours, of random weights large enough to matter."""
    torch.manual_seed(seed)
    model = PackedBlip(SIZES, "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
