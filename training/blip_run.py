"""A BLIP trained by the loop, the loader and the checkpoints that train a CLIP: from the plan to two folders.

`model/captioner` and `model/matcher` are transformers' models, those of the losses that were trained. Images are
squashed to the model's square, as BlipImageProcessor does it. With `blip.start` a training goes on from such folders:
so captioner (lm) and match filter (itc, itm) are fine-tuned apart from one pretrained pair.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pairs.pretrain import PretrainSpec, fits, shape_of, text_positions
from pairs.store import Store
from training import blip_export, frame
from training.accumulate import Context
from training.blip_momentum import Keys, Memory
from training.blip_objective import Aims, Entry, Pairs, keys_of, losses, pairs_of, ramped, total
from training.checkpoint import CARD, Facts, card
from training.config import TrainConfig, TrainResult, folder_of
from training.data import Batch
from training.models.blip import PackedBlip, Sizes, spans_of
from training.parallel import place, settle
from training.plan import Cost, Plan
from training.teach import Found
from training.tokens import bert_tokenizer, mark

ROLES = {"captioner": (blip_export.CAPTIONER, "lm"), "matcher": (blip_export.MATCHER, "itm")}  # and what trains each

UNMEASURED = ("tokens_per_s", "fill", "flops_per_s", "mfu")  # the loader knows of a CLIP's streams, not of these


@dataclasses.dataclass
class Bootstrapping:
    """What a step of BLIP computes. `memory` is there where contrast is trained."""

    model: PackedBlip
    memory: Memory | None
    plan: Plan
    aims: Aims
    spec: PretrainSpec
    rank: int
    keys: Keys | None = None
    unmeasured: tuple[str, ...] = UNMEASURED

    def ready(self) -> None:
        if self.memory:
            self.memory.follow(self.model)

    def loss(self, run: nn.Module, batch: Batch, step: int, mixed: Context) -> Found:
        ((images, _),) = batch.parts
        pairs = self.pairs(batch, step).to(images.patches.device)
        blip = self.spec.blip
        alpha = ramped(blip.alpha, step, round(blip.ramp_epochs * len(self.plan) / self.spec.batch_pairs))
        with mixed():
            if self.memory:
                self.keys = keys_of(self.memory, images, pairs)
            parts = run(lambda model: losses(model, images, pairs, self.keys, self.aims, alpha))
        value, count, told = total(parts, pairs.valid_B, len(batch.counts))

        def back(loss: Tensor) -> None:
            loss.backward()  # type: ignore[no-untyped-call]
            settle(run)

        return value, count, back, told

    def pairs(self, batch: Batch, step: int) -> Pairs:
        """The step's pairs, on the host; the device isn't waited for."""
        flat = [self._entry(row, text) for row, text in batch.same.tolist()]
        ends = [sum(batch.counts[:i]) for i in range(len(batch.counts) + 1)]
        split = [flat[a:b] for a, b in itertools.pairwise(ends)]
        return pairs_of(split, self.rank, spans_of(batch.parts[0][0]), batch.valid, self.spec.seed, step)

    def _entry(self, row: int, text: int) -> Entry:
        ids = torch.from_numpy(self.plan.tokens.used[self.plan.tokens.ids[text]])
        return Entry(row, self.plan.uids[row], text, ids)

    def done(self) -> None:
        if self.memory and self.keys:
            self.memory.push(self.keys)

    def kept(self, batch: Batch, half: bool) -> float:
        ((images, texts),) = batch.parts
        (layers, width, _), asked = self.model.sizes.text, self.aims.losses
        patches, tokens = len(images.place), len(texts.tokens)
        # A text looks at copies of its image's keys and values, and each wrong pair is another look.
        looks = 3 * ("itm" in asked) + ("lm" in asked)
        floats = layers * width * (16 * tokens * ("itc" in asked) + looks * (20 * tokens + 2 * patches))
        floats += 3 * tokens * self.model.sizes.vocabulary * ("lm" in asked)
        places = len(self.memory.same_Q2) + len(batch.same) if self.memory else 0
        return 4.0 * (floats * (0.6 if half else 1) + 10 * len(batch.valid) * places)


def train_blip_rank(config: TrainConfig, rank: int, ranks: int, device: torch.device) -> TrainResult:
    """As `training.run.train_rank`, for objective: blip."""
    spec = _named(config.spec)
    return frame.train(config, spec, rank, ranks, device, functools.partial(_begin, spec))


def _begin(spec: PretrainSpec, store: Store, plan: Plan, rank: int, ranks: int, device: torch.device) -> frame.Work:
    m, asked = spec.model, spec.blip.losses
    model, processor = build(spec, store)
    model.only(asked)
    memory = Memory(model, spec.blip.queue, spec.blip.momentum).to(device) if "itc" in asked else None
    for module in (model, memory.encoders) if memory else (model,):
        place(module, spec.parallel, ranks, device)
    parts = [role for role, (_, loss) in ROLES.items() if loss in asked]

    def publish(folder: Path, weights: dict[str, Tensor], facts: Facts) -> None:
        for role in parts:
            blip_export.save(folder / role, model.sizes, weights, ROLES[role][0], processor, facts)
        Store(folder).write(CARD, card(facts))  # last: it tells that all is done

    return frame.Work(
        model=model,
        beside={"memory": memory} if memory else {},
        cost=Cost((m.vision.layers, m.vision.width), (m.text.layers, 3 * m.text.width)),
        teach=Bootstrapping(model, memory, plan, aims(spec, processor.tokenizer, model.sizes.context), spec, rank),
        publish=publish,
        told={"parts": parts, "fill": None},
    )


def aims(spec: PretrainSpec, tokenizer: Any, context: int) -> Aims:
    blip = spec.blip
    return Aims(
        losses=frozenset(blip.losses),
        match=mark(tokenizer, blip.match_mark),
        write=tokenizer.bos_token_id,
        prompt=tuple(tokenizer(blip.prompt, add_special_tokens=False)["input_ids"]) if blip.prompt else (),
        unknown=tokenizer.unk_token_id,
        smoothing=blip.smoothing,
        context=context,
    )


def build(spec: PretrainSpec, store: Store) -> tuple[PackedBlip, Any]:
    """The model and its processor, of the folders in `blip.start` or new."""
    torch.manual_seed(spec.seed)
    m = spec.model
    if spec.blip.start:
        model, processor = blip_export.load(
            *(Path(folder_of(store, name)) for name in spec.blip.start), backend=spec.attention
        )
        fits(m, model.sizes.shape, model.sizes.context, spec.blip.start)
        return model.train(), processor
    tokenizer = bert_tokenizer(folder_of(store, m.tokenizer))
    sizes = Sizes(*shape_of(m), len(tokenizer), text_positions(m.context))
    from transformers import BlipImageProcessor, BlipProcessor

    images = BlipImageProcessor(size={"height": m.image_px, "width": m.image_px})
    return PackedBlip(sizes, spec.attention), BlipProcessor(images, tokenizer)


def _named(spec: PretrainSpec) -> PretrainSpec:
    """With the tokenizer of the folder that training goes on from."""
    if not spec.blip.start:
        return spec
    return spec.model_copy(update={"model": spec.model.model_copy(update={"tokenizer": spec.blip.start[0]})})
