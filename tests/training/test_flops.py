"""What a step's FLOPs are: an explicit count, a third of it where nothing learns, and heads by their matrices."""

import torch

from pairs.store import Store
from tests.training.small import MODEL, SPEC, shards
from training.data import Batch, Loader
from training.export import build
from training.flops import step_flops
from training.models.clip import Towers
from training.models.locked import Head, Rows, lock, put_heads
from training.plan import Cost
from training.tables import make_plan

COST = Cost((2, 32), (2, 32))


def _batch(store: Store, multiple: int = 1) -> tuple[Batch, float, float]:
    """A batch, and what its images and texts cost forwards."""
    plan, _ = make_plan(store, shards(store), SPEC)
    batch = Loader(plan, store, 0, 1, COST, 8, 0.0, multiple=multiple).load(0)
    patches, texts = plan.tokens_of(plan.rows(0)).T
    images, words = COST(patches + 1, 0 * texts).sum(), COST(0 * patches, texts).sum()
    return batch, float(images), float(words)


def _model() -> Towers:
    return build(MODEL, 0)


def test_backward_is_twice_the_forward_and_tails_are_nothing(memory_store: Store) -> None:
    for multiple in (1, 64):
        batch, images, words = _batch(memory_store, multiple)
        assert step_flops(_model(), batch) == 3 * (images + words)
    assert batch.computed > batch.useful


def test_what_is_locked_is_counted_forwards_alone(memory_store: Store) -> None:
    batch, images, words = _batch(memory_store)
    model = _model()
    lock(model, "image", 0)
    assert step_flops(model, batch) == images + 3 * words
    lock(model, "image", 2)  # the last of two blocks learns
    assert step_flops(model, batch) == 2 * images + 3 * words
    assert step_flops(model.requires_grad_(False), batch) * 3 == step_flops(_model(), batch)


def test_heads_on_columns_have_their_matrices(memory_store: Store) -> None:
    batch, _, words = _batch(memory_store)
    model, rows = _model(), Rows(torch.zeros(16, 20, dtype=torch.float16))
    put_heads(model, Head(20, [50], 32), None)
    columned = Batch(tuple((rows, texts) for _, texts in batch.parts), batch.valid, batch.same, batch.counts, {})
    head = 16 * 2 * (20 * 50 + 50 * 32)
    assert step_flops(model, columned) == 3 * (head + words)
    model.visual.requires_grad_(False)
    assert step_flops(model, columned) == head + 3 * words
