"""The packed CLIP: equal to itself one example at a time, isolated, at any aspect; packing loses and adds nothing."""

import itertools

import torch

from tests.training.small import MODEL
from training.export import build
from training.models.clip import _resizing
from training.packing import pack_images, pack_texts

torch.set_num_threads(1)
GRIDS = [(4, 4), (2, 6), (6, 2), (1, 1), (3, 5), (2, 6)]


def _patches(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (h * w, 192), generator=generator, dtype=torch.uint8) for h, w in GRIDS]


TEXTS = [
    torch.tensor([5, 9, 2, 7]),
    torch.tensor([5, 7]),
    torch.tensor([5, *range(10, 20), 7]),
    torch.tensor([5, 3, 4, 7]),
]


def test_a_packed_batch_gives_what_each_example_gives_alone() -> None:
    model = build(MODEL, 1).double()
    images = model.encode_image(pack_images(_patches(), GRIDS))
    texts = model.encode_text(pack_texts(TEXTS))
    for i, (patches, grid) in enumerate(zip(_patches(), GRIDS, strict=True)):
        torch.testing.assert_close(images[i], model.encode_image(pack_images([patches], [grid]))[0])
    for i, text in enumerate(TEXTS):
        torch.testing.assert_close(texts[i], model.encode_text(pack_texts([text]))[0])


def test_nothing_is_packed_but_the_examples() -> None:
    packed = pack_images(_patches(), GRIDS)
    assert packed.useful == len(packed.place) == sum(1 + h * w for h, w in GRIDS)


def test_another_document_changes_no_output_and_no_input_gradient() -> None:
    model = build(MODEL, 1)

    def outcome(noise: float) -> tuple[torch.Tensor, torch.Tensor]:
        patches = [p.float() / 255 for p in _patches()]
        patches[1] = patches[1] + noise
        packed = pack_images([p.requires_grad_() for p in patches], GRIDS)
        out = model.encode_image(packed)
        out.square().sum().backward()
        grads = [p.grad for i, p in enumerate(patches) if i != 1]
        return out[[0, 2, 3, 4, 5]], torch.cat([g for g in grads if g is not None])

    for before, after in zip(outcome(0.0), outcome(3.0), strict=True):
        assert torch.equal(before, after)


def test_own_grid_keeps_positions_and_others_stay_means_of_them() -> None:
    assert torch.equal(_resizing(4, (4, 4)), torch.eye(16))
    for grid in itertools.product((1, 3, 7), repeat=2):
        rows = _resizing(4, grid)
        assert rows.shape == (grid[0] * grid[1], 16)
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)))


def test_a_black_patch_is_no_class_token() -> None:
    model = build(MODEL, 1)
    black, grey = (torch.full((16, 192), value, dtype=torch.uint8) for value in (0, 116))
    features = model.encode_image(pack_images([black, grey], [(4, 4), (4, 4)]))
    assert not torch.allclose(features[0], features[1], atol=1e-3)


def test_tokens_are_pooled_at_the_last_and_later_ones_do_not_reach_earlier() -> None:
    model = build(MODEL, 1)
    a, b = torch.tensor([5, 9, 2, 7]), torch.tensor([5, 9, 2, 7, 8])
    features = model.encode_text(pack_texts([a, b]))
    assert not torch.allclose(features[0], features[1], atol=1e-4)
    packed = pack_texts([b, a])
    assert packed.tokens[packed.pool].tolist() == [8, 7]


def test_a_tail_fills_the_stream_and_changes_no_feature() -> None:
    model = build(MODEL, 1).double()
    images, texts = pack_images(_patches(), GRIDS, multiple=64), pack_texts(TEXTS, multiple=32)
    assert len(images.place) % 64 == 0 and images.useful == sum(1 + h * w for h, w in GRIDS) < len(images.place)
    assert len(texts.tokens) == 32 and texts.useful == sum(map(len, TEXTS)) and texts.layout.cu_seqlens[-1] == 32
    torch.testing.assert_close(model.encode_image(images), model.encode_image(pack_images(_patches(), GRIDS)))
    torch.testing.assert_close(model.encode_text(texts), model.encode_text(pack_texts(TEXTS)))


def test_dropped_patches_leave_the_others_at_their_places() -> None:
    model = build(MODEL, 1).double()
    cells = [torch.arange(h * w) for h, w in GRIDS]
    cells[1], cells[4] = torch.tensor([0, 5, 11]), torch.tensor([14])
    packed = pack_images([p[c] for p, c in zip(_patches(), cells, strict=True)], GRIDS, cells=cells)
    features, whole = model.encode_image(packed), model.encode_image(pack_images(_patches(), GRIDS))
    for i in range(len(GRIDS)):
        assert torch.allclose(features[i], whole[i], atol=1e-9) == (i not in (1, 4))
    other = [torch.tensor([0, 5, 10]) if i == 1 else c for i, c in enumerate(cells)]
    moved = pack_images([p[c] for p, c in zip(_patches(), cells, strict=True)], GRIDS, cells=other)
    assert not torch.allclose(model.encode_image(moved)[1], features[1], atol=1e-6)
