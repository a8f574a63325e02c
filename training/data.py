"""From the plan to packed batches, made ahead of the step: blocks are read, decoded and packed.

Everything about a batch's shape comes from the plan, so a damaged image changes none: its patches are zeros, its pair
is masked and counted. A block that can't be read ends the run. Decoding takes place in a thread (it releases the
interpreter's lock) or in processes (`decoding`), with the same bytes in any number of them. With a `multiple` of tokens
above 1, streams are filled up to one shape for the whole run, which the plan's survey tells (decision 11).
"""

import contextlib
import logging
import mmap
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pairs.store import Store
from training.blocks import Blocks, Cache
from training.decoding import PORTION, Decoders
from training.packing import CLIP, Form, Move, PackedImages, PackedTexts, frame_images, pack_texts
from training.pixels import Item, Look, cells_of, fill
from training.plan import Cost, Plan

log = logging.getLogger("pairmill.training")
SLACK, IN = 4, 4096  # tokens by which whole pairs may leave a share above its part of a window: so many, and one in
AHEAD = 3  # steps in the making
Pairs = Sequence[tuple[int, int]]  # epoch and row


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step, in one or more `parts` that follow one another. `same` holds row and text of all
    ranks' pairs, in order of rank. On a device lie the parts alone: what else there is, BLIP reads on the host."""

    parts: tuple[tuple[PackedImages, PackedTexts], ...]
    valid: torch.Tensor  # bool (own pairs,)
    same: torch.Tensor  # int64 (all pairs, 2): pairs that share either are not negatives
    counts: tuple[int, ...]  # pairs by rank
    damaged: dict[str, int]  # own pairs that couldn't be decoded, by reason

    def moved(self, move: Move) -> "Batch":
        """With each tensor as `move` gives it, such as in pinned memory."""
        parts = tuple((images.moved(move), texts.moved(move)) for images, texts in self.parts)
        return Batch(parts, move(self.valid), move(self.same), self.counts, self.damaged)

    def to(self, device: torch.device) -> "Batch":
        return replace(self.moved(lambda x: x.to(device, non_blocking=True)), valid=self.valid, same=self.same)

    @property
    def useful(self) -> int:
        """Tokens that belong to examples."""
        return sum(images.useful + texts.useful for images, texts in self.parts)

    @property
    def computed(self) -> int:
        return sum(len(images.place) + len(texts.tokens) for images, texts in self.parts)


class Loader:
    """Batches of one rank, step after step. `wait_s` is how long the last one was waited for; `shapes` counts parts by
    pairs, image tokens and text tokens. `steps` are those of the run that its shape shall serve."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        rank: int,
        ranks: int,
        cost: Cost,
        patch_px: int,
        jitter: float,
        form: Form = CLIP,
        accumulate: int = 1,
        multiple: int = 1,
        steps: int = 1,
        workers: int = 0,
        cache: Cache | None = None,
    ) -> None:
        assert ranks <= plan.batch_pairs, "each rank has a pair"
        self.plan, self.rank, self.ranks, self.cost, self.form = plan, rank, ranks, cost, form
        self.look = Look(plan.seed, patch_px, jitter, plan.dropout)
        self.parts, self.multiple, self.workers = min(accumulate, plan.batch_pairs // ranks), multiple, workers
        self.least = self._least(steps) if multiple > 1 else (0, 0)
        self.wait_s, self.shapes = 0.0, Counter[tuple[int, int, int]]()
        self._blocks = Blocks(plan, store, self._rows, cache)
        self._decoders: Decoders | None = None
        self._portions: ThreadPoolExecutor | None = None

    def batches(self, start: int, end: int, pin: bool = False) -> Iterator[Batch]:
        """The batches of steps [start, end), `AHEAD` of them in the making; `pin`: in memory that a GPU copies from."""

        def make(step: int) -> Batch:
            batch = self.load(step)
            return batch.moved(torch.Tensor.pin_memory) if pin else batch

        pool = ThreadPoolExecutor(AHEAD if self.workers else 1, "decode")
        with self._blocks.over(start, end), self._processes(), pool:
            pending: list[Future[Batch]] = [pool.submit(make, s) for s in range(start, min(end, start + AHEAD))]
            try:
                for step in range(start, end):
                    began = time.perf_counter()
                    batch = pending.pop(0).result()
                    self.wait_s = time.perf_counter() - began
                    self.shapes.update((len(i.pool), len(i.place), len(t.tokens)) for i, t in batch.parts)
                    if step + AHEAD < end:
                        pending.append(pool.submit(make, step + AHEAD))
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)
        if self.multiple > 1:
            log.info("rank %d met %d shapes of %d parts", self.rank, len(self.shapes), self.shapes.total())

    @contextlib.contextmanager
    def _processes(self) -> Iterator[None]:
        """Decoder processes, while the block lasts, if any are wanted."""
        if not self.workers:
            yield
            return
        decoders = Decoders(self.workers, self.look, int((self.plan.widths * self.plan.heights).max()))
        with contextlib.closing(decoders), ThreadPoolExecutor(self.workers, "portion") as self._portions:
            self._decoders = decoders
            yield
        self._decoders = None

    def load(self, step: int) -> Batch:
        """This rank's batch of `step`, packed; heavy and light pairs are spread over ranks and parts."""
        if not self._blocks.serves(step):
            with self._blocks.over(step, step + 1):
                return Loader.load(self, step)
        shares = self.plan.split(step, self.ranks * self.parts, self.cost)
        self._blocks.look(step)
        made = [self._part(pairs) for pairs in self._own(shares)]
        self._blocks.done(step)
        valid = torch.cat([fine for _, fine in made])
        lost = int((~valid).sum())
        return Batch(
            parts=tuple(part for part, _ in made),
            valid=valid,
            same=torch.tensor([[row, self.plan.text(epoch, row)] for share in shares for epoch, row in share]),
            counts=tuple(sum(map(len, shares[i : i + self.parts])) for i in range(0, len(shares), self.parts)),
            damaged={"undecodable": lost} if lost else {},
        )

    def _own(self, shares: list[list[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        return shares[self.rank * self.parts : (self.rank + 1) * self.parts]

    def _rows(self, step: int) -> npt.NDArray[np.int64]:
        """The rows whose images this rank takes."""
        own = self._own(self.plan.split(step, self.ranks * self.parts, self.cost))
        return np.array([row for pairs in own for _, row in pairs], np.int64)

    def _least(self, steps: int) -> tuple[int, int]:
        """The lengths of the two streams that hold a part of (nearly) every step."""
        shares = self.ranks * self.parts
        patches, texts = self.plan.largest(steps, shares)
        tokens = patches + int(self.form.class_token) * -(-self.plan.batch_pairs // shares), texts
        images, words = (-(-(n + SLACK + n // IN) // self.multiple) * self.multiple for n in tokens)
        return images, words

    def _part(self, pairs: Pairs) -> tuple[tuple[PackedImages, PackedTexts], torch.Tensor]:
        """The pairs, packed, and whether each has an image."""
        grids = [self.plan.grid(row) for _, row in pairs]
        cells = [cells_of(grid, e, self.plan.uids[r], self.look) for grid, (e, r) in zip(grids, pairs, strict=True)]
        frame = frame_images(grids, cells, self.form, self.multiple, self.least[0])
        items = [self._item(*pairs[i], frame.starts[i]) for i in frame.order]
        patches, fine = self._pixels(len(frame.place), items)
        texts = [torch.from_numpy(self.plan.tokens.ids[self.plan.text(epoch, row)]) for epoch, row in pairs]
        packed = frame.holding(patches), pack_texts(texts, self.form, self.multiple, self.least[1])
        valid = torch.empty(len(pairs), dtype=torch.bool)
        valid[torch.tensor(frame.order)] = torch.tensor(fine)
        return packed, valid

    def _item(self, epoch: int, row: int, start: int) -> Item:
        size = (int(self.plan.widths[row]), int(self.plan.heights[row]))
        return Item(self._blocks.image(row), size, self.plan.grid(row), epoch, self.plan.uids[row], start)

    def _pixels(self, tokens: int, items: Sequence[Item]) -> tuple[torch.Tensor, list[bool]]:
        """The images' patches in a stream (tokens, 3·P·P) of uint8, zeros elsewhere; whether each could be decoded."""
        width = 3 * self.look.patch_px**2
        if not self._decoders or not self._portions:
            rows = np.zeros((tokens, width), np.uint8)
            return torch.from_numpy(rows), [fill(rows, item, self.look) for item in items]
        memory = os.memfd_create("pairmill-stream")
        try:
            os.ftruncate(memory, tokens * width)
            portions = [items[i : i + PORTION] for i in range(0, len(items), PORTION)]
            done = self._portions.map(lambda part: self._decode(memory, width, part), portions)
            fine = [one for portion in done for one in portion]
            shared = mmap.mmap(memory, tokens * width)
        finally:
            os.close(memory)
        return torch.frombuffer(shared, dtype=torch.uint8).view(tokens, width), fine

    def _decode(self, memory: int, width: int, items: Sequence[Item]) -> list[bool]:
        assert self._decoders

        def told() -> str:
            uids = {item.uid for item in items}
            rows = [row for row, uid in enumerate(self.plan.uids) if uid in uids]
            return ", ".join(sorted({self.plan.blocks[self.plan.block_of[row]].shard.tar for row in rows}))

        return self._decoders.fill(memory, width, items, told)


def cache_at(folder: str | None, gigabytes: float) -> Cache | None:
    """The cache of blocks that a recipe asks for."""
    return Cache(Path(folder), int(gigabytes * 1e9)) if folder else None
