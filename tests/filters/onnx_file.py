"""A tiny ONNX classifier, written byte by byte (the library that writes such files isn't needed to run them): the mean
of each channel, then a linear layer. Field numbers are those of onnx.proto.
"""

from pathlib import Path

import numpy as np


def _number(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    data = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(data)) + data


def _node(op: str, inputs: list[str], output: str) -> bytes:
    return _field(1, b"".join(_field(1, name) for name in inputs) + _field(2, output) + _field(4, op))


def _tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_field(1, side) for side in array.shape)
    return _field(5, dims + _field(2, 1) + _field(8, name) + _field(9, array.astype("<f4").tobytes()))


def _shaped(number: int, name: str, shape: list[int]) -> bytes:
    dims = b"".join(_field(1, _field(1, side)) for side in shape)
    return _field(number, _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims))))


def write_colour_classifier(path: Path, weight_3K: np.ndarray, size_px: int) -> None:
    """[1, 3, size, size] float → channel means @ `weight_3K`, [1, K]."""
    classes = weight_3K.shape[1]
    graph = (
        _node("GlobalAveragePool", ["x"], "pooled") + _node("Flatten", ["pooled"], "flat")
        + _node("Gemm", ["flat", "weight", "bias"], "y") + _field(2, "colours")
        + _tensor("weight", weight_3K) + _tensor("bias", np.zeros(classes))
        + _shaped(11, "x", [1, 3, size_px, size_px]) + _shaped(12, "y", [1, classes])
    )  # fmt: skip
    path.write_bytes(_field(1, 8) + _field(8, _field(1, "") + _field(2, 13)) + _field(7, graph))
