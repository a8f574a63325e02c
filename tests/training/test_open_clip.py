"""Weights go both ways between open_clip and the packed towers: the same features for the model's own square images."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pairs.errors import PairmillError
from pairs.pretrain import ModelSpec, PretrainSpec, TowerSpec
from tests.training.small import MODEL
from training import export
from training.models.clip import Towers
from training.packing import pack_images, pack_texts
from training.pixels import patchify

NAMES = [
    "ViT-B-32",
    "ViT-B-16-SigLIP",
    pytest.param("ViT-B-16", marks=pytest.mark.slow),
    pytest.param("ViT-L-14", marks=pytest.mark.slow),
]
FRESH = """
import sys, open_clip, torch
folder = sys.argv[1]
model = open_clip.create_model(f"local-dir:{folder}").eval()
given = torch.load(f"{folder}/given.pt")
with torch.inference_mode():
    found = model.encode_image(given["images"], True), model.encode_text(given["texts"], True)
torch.save(found, f"{folder}/found.pt")
"""


def given(
    side: int, context: int, vocabulary: int, mean: Any, std: Any
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Pictures as uint8, the same as a normalised batch, and texts that end in the largest token, then zeros."""
    chance = np.random.default_rng(5)
    pictures = chance.integers(0, 256, (2, side, side, 3), np.uint8)
    shift, scale = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    batch = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - shift) / scale
    texts = torch.zeros(2, context, dtype=torch.int64)
    for row, length in zip(texts, (4, context), strict=True):
        row[:length] = torch.from_numpy(chance.integers(1, vocabulary - 1, length))
        row[length - 1] = vocabulary - 1
    return pictures, batch, texts


@torch.inference_mode()
def packed(model: Towers, spec: ModelSpec, pictures: np.ndarray, texts: torch.Tensor) -> list[torch.Tensor]:
    side = spec.image_px // spec.patch_px
    patches = [torch.from_numpy(patchify(np.asarray(p), (side, side), spec.patch_px)) for p in pictures]
    whole = not model.form.causal  # such a tower reads its padding
    ids = [row if whole else row[: int(row.argmax()) + 1] for row in texts]
    features = (
        model.encode_image(pack_images(patches, [(side, side)] * 2, model.form)),
        model.encode_text(pack_texts(ids, model.form)),
    )
    return [F.normalize(x, dim=-1) for x in features]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_their_weights_give_their_features(name: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = open_clip.create_model(name).eval()
    config = open_clip.get_model_config(name)
    (tmp_path / export.CONFIG).write_text(json.dumps({"model_cfg": config}))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / export.WEIGHTS)
    ours, spec = export.load(tmp_path)
    size = (spec.image_px, spec.context, spec.vocabulary)
    cfg = theirs.visual.preprocess_cfg
    _, batch, texts = given(*size, cfg["mean"], cfg["std"])
    with torch.inference_mode():
        expected = theirs.encode_image(batch, True), theirs.encode_text(texts, True)
    as_given = batch.permute(0, 2, 3, 1).numpy()  # without weights, open_clip doesn't know SigLIP's mean and std
    for found, want in zip(packed(ours, spec, as_given, texts), expected, strict=True):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    back = export.public_weights(spec, ours.state_dict())
    assert set(back) == set(theirs.state_dict())
    assert all(torch.equal(back[k], v) for k, v in theirs.state_dict().items())


SIGLIP = ModelSpec(
    kind="siglip", embed_dim=768, image_px=224, patch_px=16, context=64, vocabulary=32000, logit_bias=-10.0,
    vision=TowerSpec(layers=12, width=768, heads=12), text=TowerSpec(layers=2, width=768, heads=12),
)  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "spec",
    [
        MODEL,
        MODEL.model_copy(update={"positions": "factorised"}),
        MODEL.model_copy(update={"logit_bias": -10.0}),
        pytest.param(SIGLIP, marks=pytest.mark.slow),
    ],
    ids=["learned", "factorised", "biased", "siglip"],
)
def test_a_fresh_process_loads_our_export(spec: ModelSpec, tmp_path: Path) -> None:
    model = export.build(spec, 3).eval()
    export.save(tmp_path / "model", spec, model.state_dict(), {})
    told = json.loads((tmp_path / "model" / export.CONFIG).read_text())["preprocess_cfg"]
    pictures, batch, texts = given(spec.image_px, spec.context, spec.vocabulary, told["mean"], told["std"])
    torch.save({"images": batch, "texts": texts}, tmp_path / "model/given.pt")
    subprocess.run([sys.executable, "-c", FRESH, str(tmp_path / "model")], check=True)
    expected = torch.load(tmp_path / "model/found.pt")
    for found, want in zip(packed(model, spec, pictures, texts), expected, strict=True):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


def test_factorised_positions_of_another_grid_are_sums_of_rows_and_columns() -> None:
    model = export.build(MODEL.model_copy(update={"positions": "factorised"}), 1)
    places = model.visual.positions(((2, 3),))  # type: ignore[operator, union-attr]
    grid = places.reshape(2, 3, -1)
    torch.testing.assert_close(grid[0, 0] - grid[1, 0], grid[0, 2] - grid[1, 2])
    torch.testing.assert_close(grid[0, 0] - grid[0, 1], grid[1, 0] - grid[1, 1])


def test_what_goes_together_is_checked() -> None:
    spec = PretrainSpec.model_validate({"objective": "siglip"})
    assert spec.model.logit_bias == -10.0 and spec.model.logit_scale == pytest.approx(2.302585)
    with pytest.raises(ValueError, match="logit_bias"):
        PretrainSpec.model_validate({"objective": "clip", "model": {"logit_bias": -10.0}})
    with pytest.raises(PairmillError, match="siglip image tower"):
        export.config(SIGLIP.model_copy(update={"image_px": 64}))
