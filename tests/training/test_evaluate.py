"""Evaluation: intervals, chance, equal texts, unreadable images; open_clip sees the same features."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pairs.errors import PairmillError
from tests.training.small import MODEL, SPEC, encoded, picture
from training import evaluate, export
from training.loop import make_optimizer
from training.models.clip import PackedClip
from training.packing import pack_texts
from training.tokens import Ids, encode

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export.save(tmp_path / "model", MODEL, export.build(MODEL, 3).state_dict(), {"config": "none"})
    return tmp_path / "model"


def test_wilson_for_eight_of_ten() -> None:
    share = evaluate.Share.of(8, 10)
    assert (round(share.low, 3), round(share.high, 3)) == (0.49, 0.943)
    for n in range(1, 400):  # 109 of 109 ended at 0.9999999999999998, which no plot takes
        assert all(s.low <= s.value <= s.high for s in (evaluate.Share.of(right, n) for right in (0, 1, n)))
    assert evaluate.Share.of(0, 20).low == 0.0 and 0.1 < evaluate.Share.of(0, 20).high < 0.2


def test_chance_is_counted_over_equal_texts() -> None:
    assert evaluate._chance([1] * 10, 10, 1) == pytest.approx(0.1)
    assert evaluate._chance([2, 2], 4, 1) == pytest.approx(0.5)
    assert evaluate._chance([2], 4, 5) == pytest.approx(1.0)


def test_retrieval_takes_equal_texts_as_right_and_unreadable_images_as_misses(folder: Path) -> None:
    images = [encoded(picture(i)) for i in range(8)]
    same = evaluate.retrieval(folder, images, ["a box"] * 8)
    assert same.recalls["image_to_text_at_1"].value == same.chance["image_to_text_at_1"] == 1.0
    broken = evaluate.retrieval(folder, [b"no image", b"", *images[2:]], ["a box"] * 8)
    assert broken.unreadable == 2 and broken.recalls["image_to_text_at_1"].right == 6
    with pytest.raises(PairmillError, match="as many images"):
        evaluate.retrieval(folder, images, ["a box"])


def test_files_that_cannot_be_read_are_misses(folder: Path, tmp_path: Path) -> None:
    for name, i in (("red", 0), ("green", 1)):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "whole.png").write_bytes(encoded(picture(i)))
    (tmp_path / "classes" / "red" / "empty.png").touch()
    (tmp_path / "classes" / "green" / "folder.png").mkdir()
    result = evaluate.zero_shot(folder, tmp_path / "classes", ["a {}"])
    assert result.unreadable == 2 and result.accuracy.n == 4 and result.accuracy.right <= 2


def test_a_model_that_tells_classes_apart_is_seen_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, numbers in (("red", (0, 4)), ("green", (1, 5)), ("blue", (2,))):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for i in numbers:
            (tmp_path / "classes" / name / f"{i}.png").write_bytes(encoded(picture(i)))
    (tmp_path / "classes" / "blue" / "cut.png").write_bytes(encoded(picture(2))[:40])
    order = ["blue", "green", "red"]

    def by_name(_: object, texts: list[str]) -> torch.Tensor:
        return torch.stack([torch.eye(3)[next(i for i, n in enumerate(order) if n in text)] for text in texts])

    monkeypatch.setattr(evaluate, "embed_texts", by_name)
    marks = torch.eye(3)[[0, 0, 1, 2, 2, 2]]  # green 5 is taken for red
    monkeypatch.setattr(
        evaluate, "embed_images", lambda *_: (marks, torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool))
    )
    result = evaluate.zero_shot(folder, tmp_path / "classes", ["a {} thing", "{}"])
    assert result.accuracy.right == 4 and result.accuracy.n == 6 and result.unreadable == 1
    assert {name: s.right for name, s in result.per_class.items()} == {"blue": 1, "green": 1, "red": 2}
    assert result.chance == pytest.approx(1 / 3)
    with pytest.raises(PairmillError, match="two or more folders"):
        evaluate.zero_shot(folder, tmp_path / "nowhere", ["{}"])


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="open_clip_config"):
        export.load(tmp_path)


SCRIPT = """
import io, sys, numpy as np, open_clip, torch
from PIL import Image
folder, data = "local-dir:" + sys.argv[1], np.load(sys.argv[2])
model, _, prepare = open_clip.create_model_and_transforms(folder)
model.eval()
tokens = open_clip.get_tokenizer(folder)([str(t) for t in data["texts"]])
square = torch.stack([prepare(Image.fromarray(image)) for image in data["images"]])
with torch.no_grad():
    out = {"image": model.encode_image(square), "text": model.encode_text(tokens), "scale": model.logit_scale.exp()}
np.savez(sys.argv[3], **out)
"""


WHOLE = SPEC.model_copy(update={"seed": 3})


def _trained(texts: list[str], rows: Ids | None) -> PackedClip:
    """A model after two steps of AdamW on `texts` alone, with the `rows` of its token table or all of them."""
    model = export.build(MODEL, 3)
    ids = [torch.from_numpy(encode(text, MODEL.context)[0]) for text in texts]
    if rows is not None:
        model.with_vocabulary(model.token_embedding.weight[torch.from_numpy(rows)])
        ids = [torch.from_numpy(np.searchsorted(rows, i.numpy())) for i in ids]
    optimizer = make_optimizer(model, SPEC)
    for _ in range(2):
        optimizer.zero_grad()
        model.encode_text(pack_texts(ids)).square().sum().backward()
        optimizer.step()
    return model.eval()


def test_rows_that_no_text_holds_are_put_back_as_if_all_had_been_trained(tmp_path: Path) -> None:
    texts, others = ["a red box", "two green boats"], ["a purple elephant", "Ünïcode boats & red wine"]
    used = np.unique(np.concatenate([encode(text, MODEL.context)[0] for text in texts]))
    assert any(set(encode(text, MODEL.context)[0]) - set(used) for text in others)
    whole, part = _trained(texts, None), _trained(texts, used)
    weights = dict(part.state_dict())
    rows = weights["token_embedding.weight"]
    assert len(rows) == len(used) < 20 and not torch.equal(rows, export.build(MODEL, 3).token_embedding.weight[used])
    weights["token_embedding.weight"] = export.whole_table(WHOLE, used, rows)
    export.save(tmp_path / "model", MODEL, weights, {})
    loaded, _ = export.load(tmp_path / "model")
    torch.testing.assert_close(
        evaluate.embed_texts(loaded, texts + others), evaluate.embed_texts(whole, texts + others), rtol=0, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("rows", ["all", "used"])
def test_open_clip_gives_the_same_features_in_a_fresh_process(rows: str, folder: Path, tmp_path: Path) -> None:
    images = np.stack([picture(i)[:32, :32] for i in range(4)])
    texts = ["a red box", "Ünïcode & more", "word " * 40]
    if rows == "used":
        used = np.unique(encode(texts[0], MODEL.context)[0])
        weights = dict(_trained(texts[:1], used).state_dict())
        table = export.whole_table(WHOLE, used, weights["token_embedding.weight"])
        export.save(folder, MODEL, weights | {"token_embedding.weight": table}, {})
    np.savez(tmp_path / "in.npz", images=images, texts=texts)
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True)
    theirs, (model, spec) = np.load(tmp_path / "out.npz"), export.load(folder)
    assert spec == MODEL
    ours, ok = evaluate.embed_images(model, [encoded(image) for image in images])
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (theirs["image"], theirs["text"])]
    np.testing.assert_allclose(ours.numpy(), unit[0], atol=1e-5)
    np.testing.assert_allclose(evaluate.embed_texts(model, texts).numpy(), unit[1], atol=1e-5)
    assert ok.all() and float(theirs["scale"]) == pytest.approx(1 / 0.07, rel=1e-5)
