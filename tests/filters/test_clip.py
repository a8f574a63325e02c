"""What `clip` says, against open_clip's own preprocessing and forward pass, and which mistakes it names."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from filters.base import Batch
from filters.clip import Clip
from filters.clip_model import Loaded, prepare
from pairs.errors import PairmillError
from tests.filters.scoring import fresh_folder, small
from tests.filters.shards import draw
from tests.filters.weights import clip_folder

BATCH = Batch(
    ["a", "b", "c"],
    {"texts": [[{"text": t} for t in ("a red boat", None, "a dog")], [{"text": "a tree"}], []]},
    [draw(1, 40, 60), None, draw(2, 90, 30)],
)


def test_cosines_are_those_of_open_clip() -> None:
    import open_clip

    clip = small("clip")
    assert isinstance(clip, Clip)
    found: Any = clip.score(BATCH)
    torch.set_num_threads(1)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip.weights}")
    tokens = open_clip.get_tokenizer(f"local-dir:{clip.weights}")(["a red boat", "a dog"])
    with torch.inference_mode():
        image = model.eval().encode_image(transform(Image.fromarray(BATCH.pixels[0]))[None], normalize=True)[0]
        text = model.encode_text(tokens, normalize=True)
    cosines = (text @ image).tolist()
    assert found["cosine"][0] == pytest.approx(cosines[0], abs=5e-3)
    assert [found["cosines"][0][0], found["cosines"][0][2]] == pytest.approx(cosines, abs=5e-3)
    assert np.allclose(found["image"][0].astype(np.float32), image.numpy(), atol=5e-3)
    assert np.allclose(found["text"][0].astype(np.float32), text[0].numpy(), atol=1e-3)


def test_lists_are_aligned_with_the_texts_and_null_without_image_or_text() -> None:
    found: Any = small("clip").score(BATCH)
    assert [row and len(row) for row in found["cosines"]] == [3, None, []]
    assert found["cosines"][0][1] is None
    assert found["cosine"][1] is None and found["cosine"][2] is None
    assert found["image"][1] is None and found["image"][2] is not None
    assert found["text"][1] is not None and found["text"][2] is None
    assert all(-1 <= value <= 1 for value in found["cosines"][0] if value is not None)


def test_texts_are_embedded_once_and_long_ones_by_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = small("clip")
    assert isinstance(clip, Clip)
    long = "a red boat on  the\nlake " * 200
    texts = [[{"text": t} for t in row] for row in ([long, "a cat"], ["a cat", long], ["a cat"])]
    asked: list[int] = []
    real = Loaded.embed_texts
    monkeypatch.setattr(Loaded, "embed_texts", lambda s, some, n: (asked.append(len(some)), real(s, some, n))[1])
    found: Any = clip.score(Batch(["a", "b", "c"], {"texts": texts}, [draw(1), draw(1), None]))
    assert asked == [2]
    assert found["cosines"][0] == found["cosines"][1][::-1]
    assert np.array_equal(found["text"][1], found["text"][2])
    short: Any = clip.score(Batch(["a"], {"texts": [[{"text": long[:400]}]]}, [draw(1)]))
    assert np.array_equal(short["text"][0], found["text"][0]), "what passes the context changes nothing"


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("shape", [(300, 200), (20, 90), (64, 64), (33, 200)])
def test_images_are_prepared_as_open_clip_prepares_them(mode: str, shape: tuple[int, int]) -> None:
    """Against PIL's resize in open_clip's transform: within a grey level or so, which antialiasing in 8 bits allows."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    config = PreprocessCfg(size=48, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode)
    image = draw(7, *shape)
    theirs = image_transform_v2(config, is_train=False)(Image.fromarray(image)) * 255
    ours = prepare(image, {"size": 48, "resize_mode": mode, "interpolation": "bicubic", "fill_color": 0}).float()
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 3
    assert (ours - theirs).abs().mean() < 0.2


def test_other_weights_have_another_fingerprint_and_are_loaded_anew() -> None:
    folder = fresh_folder()
    clip = Clip(**clip_folder(folder))
    before, cosine = clip.content_hashes(), clip.score(BATCH)["cosine"][0]
    file = folder / "open_clip_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: value * 1.5 for name, value in load_file(file).items()}, file)
    assert clip.content_hashes() != before
    assert clip.score(BATCH)["cosine"][0] != cosine


def test_bf16_is_near_fp32() -> None:
    clip = small("clip")
    assert isinstance(clip, Clip)
    half: Any = Clip(weights=clip.weights, precision="bf16").score(BATCH)
    full: Any = clip.score(BATCH)
    assert half["cosine"][0] == pytest.approx(full["cosine"][0], abs=2e-2)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"model": "ViT-B-23"}, "ViT-B-32"),
        ({"weights": "openia"}, "openai"),
        ({"weights": "previous"}, "ViT-B-32"),
        ({"weights": "no/such/folder"}, "folder"),
    ],
)
def test_a_mistake_is_named(settings: dict[str, Any], advice: str) -> None:
    with pytest.raises(PairmillError, match=advice):
        Clip(**settings).content_hashes()


def test_a_folder_without_weights_is_refused_rather_than_filled_at_random(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(PairmillError, match="its weights"):
        Clip(weights=str(tmp_path)).content_hashes()


def test_a_hub_out_of_reach_is_an_error_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    from open_clip import pretrained

    def refuse(config: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(pretrained, "download_pretrained", refuse)
    with pytest.raises(PairmillError, match="no route to host"):
        Clip(weights="laion400m_e32").content_hashes()
