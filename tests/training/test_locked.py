"""Locked towers: what is locked stays, the rest learns as if it weren't; heads learn on columns of features."""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from pairs.errors import PairmillError
from pairs.pretrain import StartSpec, TowersSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef
from pairs.store import Store
from tests.training import small
from tests.training.small import MODEL, SPEC, pair, shards
from training import export, frame
from training.accumulate import features
from training.columns import MISSING, ColumnLoader, read_columns
from training.config import TrainConfig
from training.data import Loader
from training.loop import make_optimizer
from training.models.clip import Towers
from training.models.locked import Head, Rows, draws, lock, plain
from training.objectives import OBJECTIVES, Share
from training.plan import Cost
from training.run import train_rank
from training.tables import make_plan

torch.set_num_threads(1)
CPU = torch.device("cpu")
IMAGE, TEXTS = "eyes.pooled", "words.vectors"


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A model's folder."""
    export.save(tmp_path / "given", MODEL, export.build(MODEL, 7).state_dict(), {})
    return str(tmp_path / "given")


def towers(**starts: dict[str, Any]) -> dict[str, Any]:
    return {"towers": TowersSpec(**{name: StartSpec(**start) for name, start in starts.items()})}


def gradients(model: Towers, root: Path, parts: int) -> dict[str, torch.Tensor]:
    """Of one step in float64."""
    store = Store(root)
    plan, _ = make_plan(store, shards(store), SPEC)
    batch = Loader(plan, store, 0, 1, Cost((2, 32), (2, 32)), 8, 0.1, accumulate=parts).load(1)
    (image_BE, text_BE, scale, bias), back = features(model.double(), batch.parts, contextlib.nullcontext)
    share = Share(batch.valid, batch.same, batch.counts, 0)
    back(OBJECTIVES["clip"](image_BE, text_BE, scale, bias, share)[0])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(("tower", "unlocked"), [("image", 0), ("image", 2), ("text", 0), ("text", 1)])
def test_what_isnt_locked_gets_a_full_runs_gradients(
    tmp_path: Path, weights: str, tower: str, unlocked: int, parts: int
) -> None:
    spec = SPEC.model_copy(update=towers(**{t: {"weights": weights} for t in ("image", "text")}))
    full, model = export.begin(spec), export.begin(spec)
    lock(model, tower, unlocked)
    expected, found = gradients(full, tmp_path, parts), gradients(model, tmp_path, parts)
    locked = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert locked and all(name.startswith("visual.") == (tower == "image") for name in locked)
    assert set(found) == set(expected) - locked
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12)
    held = {id(p) for group in make_optimizer(model, spec).param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name not in locked}


def test_groups_are_counted_as_open_clip_counts_them() -> None:
    import open_clip

    vision = {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 100, "layers": 2, "width": 32, "heads": 2}
    spec = MODEL.model_copy(update={"vision": MODEL.vision.model_copy(update={"layers": 3}), "vocabulary": 100})
    for unlocked in range(6):
        theirs = open_clip.model.CLIP(32, vision, text)
        theirs.lock_image_tower(unlocked_groups=unlocked)
        ours = export.build(spec, 0)
        lock(ours, "image", unlocked)
        learning = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
        assert learning[0] == learning[1], unlocked


def test_a_training_leaves_the_locked_tower_as_it_was(tmp_path: Path, weights: str) -> None:
    cfg = small.config(tmp_path, "lit", **towers(image={"weights": weights, "lock": True}))
    train_rank(cfg, 0, 1, CPU)
    before, after = (export.load(Path(f))[0].state_dict() for f in (weights, f"{cfg.out_dir}/model"))
    for name, tensor in after.items():
        same = torch.equal(tensor, before[name])
        assert same == name.startswith("visual.") or name.startswith("token_embedding"), name


def test_a_text_tower_that_starts_from_weights_keeps_their_other_tokens(tmp_path: Path, weights: str) -> None:
    cfg = small.config(tmp_path, "start", **towers(text={"weights": weights}), steps=2)
    train_rank(cfg, 0, 1, CPU)
    rows = [export.load(Path(f))[0].token_embedding.weight for f in (weights, f"{cfg.out_dir}/model")]
    same = (rows[0] == rows[1]).all(-1)
    assert 0 < int((~same).sum()) < 40 < len(same)


def test_weights_of_other_sizes_are_told(tmp_path: Path, weights: str) -> None:
    spec = SPEC.model_copy(update=towers(image={"weights": weights}))
    wide = spec.model_copy(update={"model": MODEL.model_copy(update={"embed_dim": 64})})
    with pytest.raises(PairmillError, match="embed_dim"):
        export.begin(wide)
    with pytest.raises(PairmillError, match="NAME:TAG"):
        export.begin(SPEC.model_copy(update=towers(image={"weights": "ViT-B-33:none"})))


@pytest.mark.parametrize(
    ("name", "told"),
    [("ViT-B-32:openai", "quick_gelu"), ("ViT-L-14:laion2b_s32b_b82k", "mean"), ("ViT-B-32-quickgelu:openai", "quick")],
)
def test_weights_of_another_activation_or_normalisation_are_told(name: str, told: str) -> None:
    with pytest.raises(PairmillError) as error:
        export.published(name)
    assert told in error.value.found


def test_a_folder_of_another_normalisation_is_told(weights: str) -> None:
    path = Path(weights) / export.CONFIG
    given = json.loads(path.read_text())
    given["preprocess_cfg"]["std"] = [0.229, 0.224, 0.225]
    path.write_text(json.dumps(given))
    with pytest.raises(PairmillError) as error:
        export.load(Path(weights))
    assert "std" in error.value.found


@pytest.mark.parametrize(
    "start",
    [
        {"lock": True},
        {"weights": "x", "unlocked_groups": 1},
        {"features": ["a.b"], "weights": "x"},
        {"hidden": [8]},
    ],
)
def test_settings_that_contradict_one_another_are_refused(start: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StartSpec(**start)


def columned(root: Path, out: str, steps: int = 120, blind: int = 0, **changes: Any) -> TrainConfig:
    """A config whose image tower is a column that tells colour and place, and whose text tower one of random vectors of
    each text; the first `blind` pairs have no image's, or the last of them one that overflowed."""
    cfg = small.config(root, out, steps=steps, learning_rate=1e-2, checkpoint_every=20, **changes)
    store = Store(root)
    for index, start in enumerate(range(0, 60, 24)):
        ref = ShardRef("pairs/all-0123456789ab/0000", index)
        rows = [pair(i)[0] for i in range(start, min(60, start + 24))]
        for row in rows:  # in another order, with one that isn't kept
            row["texts"] = [{"text": "not kept", "kind": "alt", "language": "en"}, *row["texts"][::-1]]
        store.write_table(ref.table, pa.Table.from_pylist(rows, schema=PAIRS), {})
        uids = pa.array([row["uid"] for row in rows])
        eyes = [None if i < blind - 1 else eye(i) for i in range(start, start + len(rows))]
        if start < blind:
            eyes[blind - 1][3] = np.inf
        words = [[word(t["text"]) for t in row["texts"]] for row in rows]
        half = pa.list_(pa.float16())
        guesses = [word(row["text"]) for row in rows]
        columns = {"pooled": pa.array(eyes, half), "guess": pa.array(guesses, half)}
        store.write_table(ref.beside("scores/eyes-0"), pa.table({"uid": uids, **columns}), {})
        table = pa.table({"uid": uids, "vectors": pa.array(words, pa.list_(half))})
        store.write_table(ref.beside("scores/words-0"), table, {})
    return cfg.model_copy(update={"scores": {"eyes": "scores/eyes-0", "words": "scores/words-0"}})


def eye(i: int) -> np.ndarray:
    found = np.random.default_rng(i).normal(0, 0.1, 12)
    found[i % 4] += 3
    found[4 + i // 4 % 4] += 3
    return found.astype(np.float16)


def word(text: str) -> np.ndarray:
    return np.random.default_rng(list(text.encode())).normal(size=20).astype(np.float16)


BOTH = towers(image={"features": [IMAGE], "hidden": [32], "dropout": 0.1}, text={"features": [TEXTS]})


def test_heads_on_columns_learn_and_are_read_back(tmp_path: Path) -> None:
    cfg = columned(tmp_path, "both", steps=240, **BOTH)
    result = train_rank(cfg, 0, 1, CPU)
    assert result.damaged == 0
    model, told = export.load_heads(Path(result.model))
    assert told == cfg.spec.towers
    names = [f"a {colour} box at the {place}" for place in small.PLACES for colour in small.COLOURS]
    images = Rows(torch.from_numpy(np.stack([eye(i) for i in range(60)])))
    texts = Rows(torch.from_numpy(np.stack([word(n) for n in names])))
    with torch.no_grad():
        image_BE, text_BE, _, _ = model(images, texts)
    right = [i // 4 % 4 * 4 + i % 4 for i in range(60)]
    assert (image_BE @ text_BE.T).argmax(1).tolist() == right


def test_the_exported_head_is_the_trained_one(tmp_path: Path) -> None:
    head = Head(12, [32], 8)
    head.fit(torch.randn(50, 12) * 5 + 3)
    values = torch.randn(6, 12)
    torch.testing.assert_close(
        Head.of(plain(head.state_dict()))(Rows(values)), head(Rows(values)), rtol=1e-5, atol=1e-5
    )


def test_a_head_on_a_column_learns_beside_a_packed_tower(tmp_path: Path) -> None:
    for name, start in (("image", {"features": [IMAGE]}), ("text", {"features": [TEXTS]})):
        cfg = columned(tmp_path, name, steps=40, **towers(**{name: start}))
        result = train_rank(cfg, 0, 1, CPU)
        assert result.loss is not None and result.loss < 2.6, name
        model, _ = export.load_heads(Path(result.model))
        assert (model.head is None) == (name == "image")
        rest = load_file(Path(result.model) / "rest.safetensors")
        assert any(key.startswith("visual.") for key in rest) == (name == "text")


def test_pairs_without_features_are_masked_and_counted(tmp_path: Path) -> None:
    cfg = columned(tmp_path, "blind", steps=15, blind=10, **BOTH)  # four epochs of 60
    result = train_rank(cfg, 0, 1, CPU)
    assert result.damaged == 40 and result.pairs == 60
    plan, _ = make_plan(Store(cfg.store), cfg.shards, cfg.spec)
    columns = read_columns(Store(cfg.store), cfg, plan)
    assert columns.image is not None and int((~columns.image.isfinite()).any(-1).sum()) == 10
    assert columns.text is not None and len(columns.text) == len(plan.tokens.ids) and not columns.text.isnan().any()
    assert MISSING == "no_features"


def test_a_killed_run_drops_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (columned(tmp_path, name, steps=30, accumulate=2, **BOTH) for name in ("whole", "broken"))
    expected = train_rank(whole, 0, 1, CPU)

    def stop(line: dict[str, Any]) -> None:
        if line.get("step") == 24:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(frame, "say", stop)
        train_rank(broken, 0, 1, CPU)
    again = train_rank(broken, 0, 1, CPU)
    assert again.resumed_from == 20
    for name in ("image_head", "text_head", "rest"):
        one, other = (load_file(Path(r.model) / f"{name}.safetensors") for r in (expected, again))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_residual_head_begins_as_its_column_and_a_locked_one_stays_it(tmp_path: Path) -> None:
    texts = {"features": [TEXTS], "lock": True}
    image = {"features": [IMAGE, "eyes.guess"], "residual": True, "dropout": 0.2}
    model = MODEL.model_copy(update={"embed_dim": 20})
    cfg = columned(tmp_path, "residual", steps=1, model=model, **towers(image=image, text=texts))
    guess, words = torch.randn(1, 32), torch.randn(1, 20)
    first = train_rank(cfg.model_copy(update={"spec": cfg.spec.model_copy(update={"learning_rate": 1e-30})}), 0, 1, CPU)
    later = train_rank(columned(tmp_path, "on", steps=30, model=model, **towers(image=image, text=texts)), 0, 1, CPU)
    for result, moved in ((first, False), (later, True)):
        heads, _ = export.load_heads(Path(result.model))
        with torch.no_grad():
            image_BE, text_BE, _, _ = heads(Rows(guess), Rows(words))
        torch.testing.assert_close(text_BE, torch.nn.functional.normalize(words))
        assert torch.allclose(image_BE, torch.nn.functional.normalize(guess[:, 12:]), atol=1e-4) != moved
    with pytest.raises(PairmillError, match="embed_dim"):
        train_rank(columned(tmp_path, "odd", steps=1, **towers(image=image, text=texts)), 0, 1, CPU)


def test_a_column_that_isnt_there_is_told(tmp_path: Path) -> None:
    cfg = columned(tmp_path, "gone", **towers(image={"features": ["nose.pooled"]}))
    with pytest.raises(PairmillError, match="nose"):
        train_rank(cfg.model_copy(update={"scores": {"nose": "scores/nose-0"}}), 0, 1, CPU)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_what_is_dropped_hangs_on_pair_epoch_and_tower_not_on_the_layout(tmp_path: Path, tower: str) -> None:
    starts = BOTH if tower == "image" else towers(text={"features": [TEXTS]})
    cfg, store = columned(tmp_path, "dropped", **starts), Store(tmp_path)
    plan, _ = make_plan(store, cfg.shards, cfg.spec)
    columns, place = read_columns(store, cfg, plan), {"image": 0, "text": 1}[tower]
    head = Head(12 if tower == "image" else 20, [64], 64, dropout=0.5)

    def made(ranks: int, parts: int, step: int) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for rank in range(ranks):
            loader = ColumnLoader(
                plan, store, rank, ranks, Cost((2, 32), (2, 32)), 8, 0.1, accumulate=parts, columns=columns
            )
            batch = loader.load(step)
            assert tower == "text" or not any((i.seeds == t.seeds).any() for i, t in batch.parts)  # type: ignore[attr-defined]
            own = batch.same[sum(batch.counts[:rank]) :, 0].tolist()
            found |= zip(own, torch.cat([head(part[place]) for part in batch.parts]), strict=False)  # type: ignore[arg-type]
        return found

    alone = made(1, 1, 1)
    assert len(alone) == 16
    for layout in ((2, 1), (1, 3), (2, 2)):
        other = made(*layout, 1)
        assert set(other) == set(alone)
        for row, value in other.items():
            torch.testing.assert_close(value, alone[row], msg=str(layout))
    later = {row: value for step in (5, 6) for row, value in made(1, 1, step).items()}
    both = set(later) & set(alone)
    assert both and not any(torch.allclose(later[row], alone[row]) for row in both)


def test_draws_are_even_and_of_their_own_for_each_row_and_place() -> None:
    drawn = draws(torch.arange(500), 3, 400)
    assert len(drawn.unique()) == drawn.numel() and torch.equal(drawn[7:8, 20:], draws(torch.tensor([7]), 23, 380))
    shares = (drawn.double() / 2**53).flatten()
    assert abs(shares.mean() - 0.5) < 0.003 and abs(shares.std() - 12**-0.5) < 0.003
    assert torch.corrcoef(drawn[:20].double()).triu(1).abs().max() < 0.25


def test_a_feature_that_hardly_varies_says_nothing() -> None:
    values = torch.randn(64, 6).half()
    values[:, 0], values[:, 1], values[:, 2] = 0.5, 0, 3
    values[::9, 2] += 0.002  # one step of fp16
    values[5, 1] = 1e-7
    values[7, 4] = torch.inf
    head, one = Head(6, [], 4), torch.zeros(1, 6)
    head.fit(values)
    assert head.scale.bool().tolist() == [False, False, False, True, True, True] and head.scale.isfinite().all()
    for found in (head, Head.of(plain(head.state_dict()))):
        torch.testing.assert_close(found(Rows(one + torch.tensor([9.0, 9, 9, 0, 0, 0]))), found(Rows(one)))
