"""A small head on an embedding that another filter made: aesthetic, unsafe, watermark scores, for a pass over numbers
instead of over images.

The weights are a safetensors file: a state dict of an `nn.Sequential` (`layers.0.weight`, `layers.0.bias`,
`layers.2.weight`, …, as LAION's aesthetic predictor has them; dropouts leave gaps in the count) or of one linear layer
(`weight`, `bias`). A pair's value is computed by itself, in fp32, so that no batch-mate can change its last bits: about
10 µs for a linear head, 150 µs for LAION's of five layers. LAION-5B: arXiv 2210.08402.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import NonNegativeInt

from filters.base import Batch, Filter
from filters.weights import Stamp, stamp
from pairs.errors import PairmillError
from pairs.fingerprint import content_hash

Layers = tuple[tuple[np.ndarray, np.ndarray], ...]  # (weight_OI, bias_O), float32
KEY = re.compile(r"(?:(?:.*\.)?(\d+)\.)?(weight|bias)")


@dataclass(frozen=True)
class Probe(Filter):
    """`value`: output number `index` of the head, raw, through a sigmoid, or its share of the softmax; null where there
    is no embedding. `normalize` scales the embedding to length 1 first; `activation` stands between the layers."""

    weights: str
    embedding: str = "clip.image"
    activation: Literal["none", "relu"] = "none"
    normalize: bool = True
    output: Literal["raw", "sigmoid", "softmax"] = "raw"
    index: NonNegativeInt = 0

    dtype = "fp32"
    columns = {"value": pa.float32()}

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.embedding,)

    def content_hashes(self) -> dict[str, str]:
        path = _file(self.weights)
        _check(self, _load(path, stamp(path)))
        return {"weights": content_hash(path)}

    def score(self, batch: Batch) -> Mapping[str, list[Any]]:
        path = _file(self.weights)
        layers = _load(path, stamp(path))
        return {"value": [None if row is None else self._value(layers, row) for row in batch[self.embedding]]}

    def _value(self, layers: Layers, embedding: Any) -> float:
        x_D = np.asarray(embedding, np.float32)
        if x_D.shape != layers[0][0].shape[1:]:
            raise PairmillError(
                expected=f"{layers[0][0].shape[1]} numbers in {self.embedding}, as the head in {self.weights} takes",
                found=f"{'×'.join(map(str, x_D.shape))} of them",
                remedy="name the embedding of the model that this head was trained on",
            )
        length = np.sqrt(x_D @ x_D)
        if self.normalize and length > 0:
            x_D = x_D / length
        for number, (weight_OI, bias_O) in enumerate(layers):
            x_D = weight_OI @ (np.maximum(x_D, 0) if number and self.activation == "relu" else x_D) + bias_O
        return float(OUTPUTS[self.output](x_D.astype(float))[self.index])


def _softmax(x_K: np.ndarray) -> np.ndarray:
    raised_K = np.exp(x_K - x_K.max(axis=-1, keepdims=True))
    return np.asarray(raised_K / raised_K.sum(axis=-1, keepdims=True))


OUTPUTS = {  # what a model's numbers [..., K] become
    "raw": lambda x_K: x_K,
    "sigmoid": lambda x_K: 1 / (1 + np.exp(-np.clip(x_K, -700, 700))),
    "softmax": _softmax,
}


def _file(weights: str) -> Path:
    path = Path(weights)
    if not path.is_file() or path.suffix != ".safetensors":
        raise PairmillError(
            expected=f"a head's weights in a safetensors file at {weights}",
            found="another kind of file" if path.is_file() else "no such file",
            remedy="save the head's state dict with safetensors.torch.save_file and name that file",
        )
    return path.resolve()


@functools.lru_cache(maxsize=8)
def _load(path: Path, _stamp: Stamp) -> Layers:
    """The linear layers in their order."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, TypeError) as error:
        raise _wrong(path, f"a file that safetensors can't read as numbers: {error}") from None
    parts: dict[int, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        found = KEY.fullmatch(key)
        if found is None:
            raise _wrong(path, f"a tensor {key!r}")
        part = parts.setdefault(int(found[1] or 0), {})
        if found[2] in part:
            raise _wrong(path, f"{key!r}, the second {found[2]} of layer {found[1]}")
        part[found[2]] = value.astype(np.float32)
    layers: list[tuple[np.ndarray, np.ndarray]] = []
    for place, part in sorted(parts.items()):
        weight = part.get("weight")
        if weight is None or weight.ndim != 2 or part.get("bias", weight[:, 0]).shape != weight.shape[:1]:
            raise _wrong(path, f"layer {place} with " + ", ".join(f"{k} {list(v.shape)}" for k, v in part.items()))
        if layers and weight.shape[1] != len(layers[-1][1]):
            raise _wrong(path, f"layer {place} that takes {weight.shape[1]} numbers after one of {len(layers[-1][1])}")
        layers.append((weight, part.get("bias", np.zeros(len(weight), np.float32))))
    return tuple(layers)


def _check(probe: Probe, layers: Layers) -> None:
    """The settings fit the head."""
    outputs = len(layers[-1][1]) if layers else 0
    if probe.index >= outputs or (probe.output == "softmax" and outputs < 2):
        raise PairmillError(
            expected=f"{'two outputs or more for softmax' if outputs > probe.index else f'an output {probe.index}'}",
            found=f"{outputs} in {probe.weights}",
            remedy="set `index` below the number of outputs, and `output: sigmoid` for a single one",
        )


def _wrong(path: Path, found: str) -> PairmillError:
    return PairmillError(
        expected=f"the weights and biases of linear layers, such as layers.0.weight and layers.0.bias, in {path}",
        found=found,
        remedy="save the state dict, fp32 or fp16, of a plain nn.Sequential of nn.Linear layers, or of one nn.Linear",
    )
