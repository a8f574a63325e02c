"""A small BLIP, trained on the trusted pairs: a captioner, and a filter that tells whether image and text match.

Both are transformers' own classes with transformers' own heads and losses, saved in its format. They share a beginning
in which patches learn words, and are then trained apart, as in BLIP: with shared parameters the filter believes what
the captioner writes (arXiv 2201.12086, section 4.4). Captioner: language modelling. Filter: contrast (ITC) and matching
(ITM). About 115 s of one core's time with the default settings, whatever the number of pairs.
"""

import contextlib
import functools
import json
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipProcessor,
)  # fmt: skip

from pairs.fingerprint import fingerprint
from pairs.identity import sha256_hex
from pairs.pretrain import BlipSpec
from pairs.process import die_with_parent
from training import checkpoint
from training.blip_data import TrustedPairs, load_pairs, make_tokenizer
from training.blip_losses import Lesson, Losses, WordReader, caption_loss, match_loss, pieces_held, word_loss
from training.blip_start import start_crossing, start_vision
from training.config import BLIP_ROLES, BlipResult

Progress = Callable[[dict[str, object]], None]
SAMPLE = 2000  # pictures that the first weights are fitted to
SEEDS = {"words": 0, "captioner": 1, "matcher": 2}  # of each stage's draws


def blip_config(spec: BlipSpec, tokenizer: BertTokenizerFast) -> BlipConfig:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": spec.text.width, "intermediate_size": 4 * spec.text.width,
        "num_hidden_layers": spec.text.layers, "num_attention_heads": spec.text.heads,
        "max_position_embeddings": spec.positions, "label_smoothing": 0.1,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id,
    }  # fmt: skip
    vision = {
        "image_size": spec.image_px, "patch_size": spec.patch_px, "hidden_size": spec.vision.width,
        "intermediate_size": 4 * spec.vision.width, "num_hidden_layers": spec.vision.layers,
        "num_attention_heads": spec.vision.heads, "initializer_range": 0.02,
    }  # fmt: skip
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=spec.embed_dim)


def train_blip(pairs: Iterable[tuple[bytes, str]], spec: BlipSpec, out_dir: Path, progress: Progress) -> BlipResult:
    """Trains both from the last checkpoint in `out_dir`, where there is one; returns at once where both are there.

    `pairs` are (encoded image, text). `progress` gets a dict per step: stage, step, steps, losses. Raises
    PairmillError where fewer than two pairs are usable.
    """
    data = load_pairs(pairs, spec.image_px)
    models = BlipResult(**{role: out_dir / role for role in BLIP_ROLES}, pairs=len(data), left_out=data.left_out)
    tokenizer = make_tokenizer([*data.texts, spec.prompt], spec.vocabulary, spec.max_tokens)
    images = BlipImageProcessor(size={"height": spec.image_px, "width": spec.image_px})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
    lesson = Lesson(data, tokenizer, spec, mean, std, pieces_held(data.texts, tokenizer))
    torch.manual_seed(spec.seed)
    captioner = BlipForConditionalGeneration(blip_config(spec, tokenizer))
    matcher = BlipForImageTextRetrieval(blip_config(spec, tokenizer))
    run = Run(lesson, out_dir / "checkpoints", _identity(data, spec), progress)
    start_vision(captioner.vision_model, (data.pixels[:SAMPLE] / 255 - mean) / std)
    start_crossing(captioner.text_decoder.bert)
    words = captioner.text_decoder.get_input_embeddings()
    if all(_made(folder, run.identity) for folder in models.models.values()):
        return models
    run.fit("words", WordReader(captioner.vision_model, words, lesson.words), word_loss, spec.word_steps, 1.0)
    processor = BlipProcessor(images, tokenizer)
    if not _made(models.beginning, run.identity):
        _publish(run, models.beginning, captioner, processor)
    matcher.vision_model.load_state_dict(captioner.vision_model.state_dict())
    matcher.text_encoder.load_state_dict(captioner.text_decoder.bert.state_dict())
    finish = functools.partial(_finish, run, processor)
    rest = (models.matcher, matcher, match_loss, spec.match_steps, spec.match_rate)
    with _beside(finish, models.captioner, captioner, caption_loss, spec.caption_steps, spec.caption_rate):
        finish(*rest)
    shutil.rmtree(run.folder, ignore_errors=True)
    return models


def _finish(
    run: "Run", processor: BlipProcessor, folder: Path, model: nn.Module, loss: Losses, steps: int, rate: float
) -> None:
    """Trains one of the two to its end and publishes it."""
    if _made(folder, run.identity):
        return
    run.fit(folder.name, model, loss, steps, rate)
    _publish(run, folder, model.eval(), processor)


def _publish(run: "Run", folder: Path, model: nn.Module, processor: BlipProcessor) -> None:
    with checkpoint.publishing(folder) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        (temporary / checkpoint.CARD).write_text(
            json.dumps({"training": run.identity, "spec": run.lesson.spec.model_dump()})
        )


@contextlib.contextmanager
def _beside(work: Callable[..., None], *arguments: object) -> Iterator[None]:
    """Does `work` in a copy of this process while the block runs: the two models have nothing more to share. With one
    thread each they are twice as fast as one after the other with two, whose steps are too small to split."""
    if torch.get_num_threads() > 1:  # a copy of a process that has more can't compute (OpenMP after fork)
        work(*arguments)
        yield
        return
    parent, fork = os.getpid(), multiprocessing.get_context("fork")
    told, tell = fork.Pipe(duplex=False)

    def alone() -> None:
        die_with_parent(parent)
        try:
            work(*arguments)
        except Exception as error:
            tell.send(error)
            raise SystemExit(1) from None

    copy = fork.Process(target=alone)
    copy.start()
    try:
        yield
        copy.join()
    finally:
        copy.kill()
    if copy.exitcode:
        lost = RuntimeError(f"the training beside this one ended with exit code {copy.exitcode}: see the log")
        raise told.recv() if told.poll() else lost


def _made(folder: Path, identity: str) -> bool:
    """Whether the model in `folder` is of this very training."""
    card = folder / checkpoint.CARD
    return card.exists() and json.loads(card.read_text())["training"] == identity


def _identity(data: TrustedPairs, spec: BlipSpec) -> str:
    content = sha256_hex(data.pixels.numpy().tobytes() + "\0".join(data.texts).encode())
    return fingerprint({"pairs": content, "spec": spec.model_dump(exclude={"checkpoint_every"})})


@dataclass(frozen=True)
class Run:
    """Where stages leave their checkpoints, whose they are, and who hears of each step."""

    lesson: Lesson
    folder: Path
    identity: str
    progress: Progress

    def fit(self, stage: str, model: nn.Module, loss: Losses, steps: int, rate: float) -> None:
        """Trains to the end, from the stage's last checkpoint. What a step sees hangs on seed, stage and step alone.
        `rate` is the stage's share of the learning rate."""
        spec, parameters = self.lesson.spec, dict(model.named_parameters())
        # state_dict names tied weights twice, which safetensors refuses
        weights = nn.ParameterDict({name.replace(".", "/"): value for name, value in parameters.items()})
        grouped = [[p for p in parameters.values() if (p.ndim > 1) == many] for many in (True, False)]
        groups = [{"params": g, "weight_decay": d} for g, d in zip(grouped, (spec.weight_decay, 0.0), strict=True)]
        optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=(0.9, 0.98))
        found = checkpoint.latest(self.folder / stage)
        start = 0
        if found and found[1]["identity"] == self.identity:
            checkpoint.restore(found[0], weights, optimizer)
            start = int(found[1]["step"])
        model.train()
        for step in range(start, steps):
            began = time.perf_counter()
            parts = self._step(stage, model, loss, optimizer, step, rate * spec.learning_rate * _pace(step, steps))
            if (step + 1) % spec.checkpoint_every == 0 or step + 1 == steps:
                facts = {"step": step + 1, "identity": self.identity}
                checkpoint.save(self.folder / stage, weights, optimizer, facts)
            took = {"seconds": round(time.perf_counter() - began, 4)}
            self.progress({"stage": stage, "step": step, "steps": steps} | parts | took)

    def _step(
        self, stage: str, model: nn.Module, loss: Losses, optimizer: torch.optim.Optimizer, step: int, rate: float
    ) -> dict[str, float]:
        spec, key = self.lesson.spec, [self.lesson.spec.seed, SEEDS[stage]]
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = _rows(len(self.lesson.pairs), spec.batch_pairs, step, key)
        with torch.autocast("cpu", torch.bfloat16, enabled=spec.precision == "bf16"):
            parts = loss(model, self.lesson, index, np.random.default_rng([*key, 1, step]))
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {name: round(value.item(), 5) for name, value in parts.items()}


def _rows(count: int, batch: int, step: int, key: list[int]) -> np.ndarray:
    """Rows of a step: each epoch is a permutation of its own, what is left over at its end is not used."""
    batch = min(batch, count)
    epoch, place = divmod(step, count // batch)
    return np.random.default_rng([*key, 0, epoch]).permutation(count)[place * batch : (place + 1) * batch]


def drawn(spec: BlipSpec, count: int, place: int) -> dict[str, list[int]]:
    """Of each stage the steps whose batch holds the pair at `place` among `count`."""
    stages = {"words": spec.word_steps, "captioner": spec.caption_steps, "matcher": spec.match_steps}
    return {
        stage: [s for s in range(steps) if place in _rows(count, spec.batch_pairs, s, [spec.seed, SEEDS[stage]])]
        for stage, steps in stages.items()
    }


def _pace(step: int, steps: int) -> float:
    """Share of the full learning rate: up over a tenth of the steps, then down along a cosine."""
    return min((step + 1) / (0.1 * steps + 1), 0.5 * (1 + math.cos(math.pi * step / steps)))
