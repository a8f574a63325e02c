"""Images captioned a second: `blip_caption`'s path against transformers' `generate` with the same weights, in one run.

    python benchmarks/blip_caption.py FOLDER [--images 48] [--repeats 2] [--sizes base small] [--precisions fp32 bf16]
        [--threads 1] [--batches 2 4 8 16] [--clock wall]

Saves random weights (BLIP-base's published size at 384 px; the small BLIP of the default recipe), [SEP] biased so that
captions end at various lengths, draws images, and lets both sides write, in turn: uint8 pixels in, texts out, warm.
transformers runs at the fastest settings that BLIP takes: inference_mode, its torchvision image processor, the model in
the same precision, batches of the sizes named (the best counts), `num_return_sequences` for several captions. (BLIP
refuses attn_implementation="sdpa", and its `generate` a static cache.) One thread, as a worker of the engine has;
more with --threads. `encoder` is each side's image tower alone on ready pixels, `writing` what remains; the bound is
the ratio that captions at no cost would give. --clock cpu counts this process's CPU seconds, for a
machine that does other work too. Prints Markdown; stops where greedy captions in fp32 differ or most have no end.
"""

import argparse
import functools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import transformers

from filters import blip
from filters.base import Batch
from filters.blip_caption import BlipCaption
from pairs.pretrain import BlipSpec
from training.blip import blip_config

PROMPT, LEAST, MOST = "a picture of ", 3, 20
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"sample": "greedy"},
    "nucleus": {"sample": "nucleus"},
    "nucleus, 3 captions": {"sample": "nucleus", "captions": 3},
    "nucleus, 5 captions": {"sample": "nucleus", "captions": 5},
    "3 beams": {"sample": "beam", "beams": 3},
}
HEAD = (
    "| captions | precision | its batch | images/s | ours | ratio | encoder ms | writing ms | ratio | bound | words |"
)
TRIED = 16  # images, or a batch of them, by which transformers' batch is chosen
SAMPLED = {"do_sample": True, "top_p": 0.9, "top_k": 0}
Side = Callable[[], list[str]]


def tokenizer(words: int) -> Any:
    """A tokenizer of `words` pieces, the prompt's among them."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "picture", "of"]
    pieces += [f"word{i}" for i in range(words - len(pieces))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    more = {"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]}
    return transformers.BertTokenizerFast(vocab=vocabulary, model_max_length=512, **more)


def configuration(size: str) -> tuple[Any, Any]:
    """(BlipConfig, tokenizer)."""
    if size == "small":
        spec = BlipSpec()
        words = tokenizer(spec.vocabulary)
        return blip_config(spec, words), words
    words = tokenizer(30524)
    text = {"num_attention_heads": 12, "bos_token_id": words.bos_token_id, "pad_token_id": words.pad_token_id}
    text |= {"eos_token_id": words.sep_token_id, "sep_token_id": words.sep_token_id}
    return transformers.BlipConfig(vision_config={"image_size": 384}, text_config=text), words


def save(size: str, folder: Path, images: list[np.ndarray]) -> str:
    """Random weights of that size. Half of the captions of some images are to have ended after ten tokens."""
    config, words = configuration(size)
    torch.manual_seed(0)
    model = transformers.BlipForConditionalGeneration(config)
    for name, value in model.named_parameters():
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=2 / value.shape[-1] ** 0.5)
        elif name.endswith("transform.LayerNorm.weight"):
            torch.nn.init.constant_(value, 6 / (2 * config.text_config.hidden_size**0.5 / value.shape[-1] ** 0.5))
    side = config.vision_config.image_size
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size={"height": side, "width": side}), words)
    one, low, high = BlipCaption("", PROMPT, "greedy", min_tokens=LEAST, max_tokens=MOST, precision="fp32"), 0.0, 40.0
    patches = list(blip.encoded(model.eval(), processor, images))
    with torch.inference_mode():
        for _ in range(6):
            model.text_decoder.cls.predictions.bias[words.sep_token_id] = (low + high) / 2
            texts = one.write(model, words, iter(patches), ["" for _ in images])
            short = statistics.median(len(text or range(MOST)) for (text,) in texts) < 10
            low, high = (low, (low + high) / 2) if short else ((low + high) / 2, high)
    for made in (processor, model):
        made.save_pretrained(folder)
    return str(folder)


def draw(number: int, side: int) -> np.ndarray:
    """An image with coarse and fine structure of its own."""
    chance = np.random.default_rng(number)
    coarse = chance.integers(0, 256, (int(chance.integers(2, 9)), 6, 3), np.uint8)
    return cv2.resize(coarse, (side * 5 // 4, side), interpolation=cv2.INTER_CUBIC)


def ours(one: BlipCaption, images: list[np.ndarray]) -> Side:
    batch = Batch([f"{i:032x}" for i in range(len(images))], {}, list(images))
    return lambda: [text for texts in one.score(batch)["texts"] for text in texts or [""]]


@functools.lru_cache(maxsize=1)
def untouched(weights: str, precision: str) -> tuple[Any, Any]:
    """transformers' own model and processor."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    model = transformers.BlipForConditionalGeneration.from_pretrained(weights, dtype=dtype).eval()
    where = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(where), transformers.BlipProcessor.from_pretrained(weights)


def theirs(one: BlipCaption, images: list[np.ndarray], at_most: int) -> Side:
    model, processor = untouched(one.weights, one.precision)
    asked: dict[str, Any] = {"max_new_tokens": MOST, "min_new_tokens": LEAST, "num_return_sequences": one.captions}
    asked |= {"greedy": {"do_sample": False}, "nucleus": SAMPLED, "beam": {"num_beams": one.beams}}[one.sample]

    @torch.inference_mode()
    def write() -> list[str]:
        texts = []
        for at in range(0, len(images), at_most):
            some = images[at : at + at_most]
            ready = processor(images=some, text=[PROMPT] * len(some), return_tensors="pt").to(model.device)
            rows = model.generate(**ready, **asked)[:, ready["input_ids"].shape[1] - 1 :]
            ended = [row if processor.tokenizer.sep_token_id in row else row[:0] for row in rows]  # ours tells no other
            texts += [processor.decode(row, skip_special_tokens=True) for row in ended]
        return texts

    return write


def encoders(one: BlipCaption, images: list[np.ndarray], at_most: int) -> tuple[Side, Side]:
    """Both sides' image tower alone."""
    model, processor = blip.load(one.weights, blip.CAPTIONS, one.precision)
    ready = blip.pictures(processor, images, model.device).to(model.dtype)
    tower = untouched(one.weights, one.precision)[0].vision_model

    @torch.inference_mode()
    def own() -> list[str]:
        together = max(1, blip.PATCHES[model.device.type] // model.vision_model.embeddings.num_positions)
        return [str(len(blip.encode(model.vision_model, rows))) for rows in ready.split(together)]

    @torch.inference_mode()
    def other() -> list[str]:
        return [str(len(tower(rows)[0])) for rows in ready.split(at_most)]

    return own, other


def seconds(work: Side, clock: Callable[[], float]) -> float:
    started = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def compare(name: str, one: BlipCaption, images: list[np.ndarray], asked: argparse.Namespace) -> str:
    """A row of the table; stops where greedy captions in fp32 differ or most have no end."""
    mine, clock = ours(one, images), {"wall": time.perf_counter, "cpu": time.process_time}[asked.clock]
    tried = {batch: theirs(one, images[: max(TRIED, batch)], batch) for batch in asked.batches}
    best = min(tried, key=lambda batch: seconds(tried[batch], clock))  # which warms it too
    other, written = theirs(one, images, best), mine()
    if one.sample == "greedy" and one.precision == "fp32":
        assert written == other() and 2 * sum(map(bool, written)) > len(written), "greedy captions differ, or most lack"
    own_tower, other_tower = encoders(one, images, best)
    each = (other, mine, other_tower, own_tower)
    found = [tuple(seconds(work, clock) for work in each) for _ in range(asked.repeats)]
    ratios = sorted(b / a for b, a, _, _ in found)
    b, a, y, x = (min(column) for column in zip(*found, strict=True))
    words = [statistics.mean(len(text.split()) for text in texts if text) for texts in (other(), written)]
    n = len(images)
    return (
        f"| {name} | {one.precision} | {best} | {n / b:.2f} | {n / a:.2f} | {statistics.median(ratios):.2f}"
        f" ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {y / n * 1e3:.0f} / {x / n * 1e3:.0f}"
        f" | {(b - y) / n * 1e3:.1f} / {(a - x) / n * 1e3:.1f} | {(b - y) / max(a - x, 1e-9):.1f} | {b / x:.2f}"
        f" | {words[0]:.1f} / {words[1]:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, value in (("images", 48), ("repeats", 2), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sizes", nargs="+", default=["base", "small"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"])
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 4, 8, 16])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{asked.images} images, {asked.repeats} repeats, {asked.threads} threads, {asked.clock} clock, {where},")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}. Figures: transformers / blip_caption.")
    for size in asked.sizes:
        images = [draw(i, 320) for i in range(asked.images)]
        weights = save(size, asked.folder / size, images[:8])
        print(f"\n## {size}\n\n{HEAD}\n|{' --- |' * HEAD.count(' |')}")
        for name in asked.cases:
            for precision in asked.precisions:
                settings = {"min_tokens": LEAST, "max_tokens": MOST, "precision": precision} | CASES[name]
                print(compare(name, BlipCaption(weights, PROMPT, **settings), images, asked), flush=True)


if __name__ == "__main__":
    main()
