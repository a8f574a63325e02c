"""Image bytes out of the web become the image we keep: the life of one decoder process (`pool.py` holds them).

It lowers its own memory limit before it reads the first image. Pillow reads the header,
so that a bomb is refused before it is decoded, and normalises: first frame, upright by EXIF, alpha on white;
grey, palette and CMYK to RGB. img2dataset's `Resizer` then resizes and encodes. Its module is loaded by itself, since
the package would bring the whole command along (9 s). About 3 ms of one core for a 640×480 JPEG, of which decoding and
resizing by area take 1.3 and 1.0.
"""

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from pairs.process import limit_memory

VERSION = 2  # raise it when the bytes of an equal image change
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
TURNS = {  # what makes each EXIF orientation upright, in Pillow's words
    **{2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"},
    **{6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"},
}
BYTES_PER_PIXEL = 24  # of all copies that are alive at once, with room
BASE_BYTES = 512 << 20
FRAME = struct.Struct("<II")  # the bytes of JSON (or of an image to decode) and of an encoded image that follow
EXIF_CHARS = 2000
PIPE_BYTES = 1 << 20  # the most that Linux gives without asking
WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")
DEEP = ("I", "F")  # more than eight bits


@dataclass(frozen=True)
class DecodeSpec:
    side_px: int
    format: str
    quality: int
    max_pixels: int
    min_side_px: int
    hash: bool = False  # whether to tell the image's perceptual hash, for a blocklist


class Decoded(NamedTuple):
    """An encoded RGB image, and what it was."""

    image: bytes
    facts: dict[
        str, Any
    ]  # width, height, original_width, original_height, original_format, exif, colour; phash where asked for


class Refusal(Exception):
    """An image that can't be used, by a stable reason."""


def load_resizer(spec: DecodeSpec) -> Callable[..., tuple[Any, ...]]:
    """img2dataset's Resizer: longer side at most `side_px`, never enlarged. It takes a stream of `_ppm`'s form, whose
    pixels it finds without decoding; colours change their order in the small image."""
    import cv2

    package = importlib.util.find_spec("img2dataset")
    assert package and package.submodule_search_locations, "img2dataset is in the lock file"
    path = Path(package.submodule_search_locations[0]) / "resizer.py"
    found = importlib.util.spec_from_file_location("img2dataset_resizer", path)
    assert found and found.loader, path
    module = importlib.util.module_from_spec(found)
    with _absent("albumentations"):
        found.loader.exec_module(module)
    module.A = SimpleNamespace(LongestMaxSize=longest_max_size)  # type: ignore[attr-defined]

    def encode(extension: str, rgb: Any, params: list[int]) -> Any:
        return cv2.imencode(extension, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), params)

    module.cv2 = SimpleNamespace(**vars(cv2) | {"imdecode": _pixels, "imencode": encode})  # type: ignore[attr-defined]
    quality = 6 if spec.format == "png" else spec.quality
    return module.Resizer(  # type: ignore[no-any-return]
        spec.side_px, "keep_ratio_largest", True, encode_quality=quality, encode_format=spec.format
    )


@contextlib.contextmanager
def _absent(name: str) -> Iterator[None]:
    """An empty module stands for `name` while an import asks for it; whoever imports it later gets the real one."""
    real = sys.modules.get(name)
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]
        if real:
            sys.modules[name] = real


def longest_max_size(max_size: int, interpolation: int, p: float) -> Callable[..., dict[str, Any]]:
    """What the Resizer asks of albumentations, whose import takes 2 s of every decoder; equal to it by a test."""
    import cv2

    def resize(image: Any) -> dict[str, Any]:
        scale = max_size / max(image.shape[:2])
        height, width = (max(1, round(side * scale)) for side in image.shape[:2])
        return {"image": cv2.resize(image, (width, height), interpolation=interpolation)}

    return resize


def _ppm(image: Any) -> bytes:
    """An RGB image as a binary PPM."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


def _pixels(ppm: Any, flags: int = 0) -> Any:
    """The array (height, width, 3) of what `_ppm` made, a vector of bytes; `flags` are those of cv2.imdecode."""
    _, width, height, _ = bytes(ppm[:40]).split(maxsplit=3)
    return ppm[-3 * int(width) * int(height) :].reshape(int(height), int(width), 3)


def decode(data: bytes, spec: DecodeSpec, resize: Callable[..., tuple[Any, ...]]) -> Decoded:
    """The kept image of `data`; raises Refusal. Runs in a decoder process."""
    from PIL import Image, UnidentifiedImageError

    Image.MAX_IMAGE_PIXELS = None  # ours is checked below, before anything is decoded
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_size(opened.size, spec)
            name, exif = opened.format or "", opened.getexif()
            colour = _colour(opened)
            upright, rgb = _normalise(opened, exif.get(0x0112))
    except UnidentifiedImageError:
        raise Refusal(_kind_of(data)) from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        IndexError,
        KeyError,
        TypeError,
        ZeroDivisionError,
    ):
        raise Refusal("damaged") from None  # what Pillow's parsers raise on a damaged file
    image, width, height, _, _, error = resize(io.BytesIO(rgb))
    if error or not image:
        raise Refusal("memory" if "memory" in str(error).lower() else "shape")
    facts = {"width": width, "height": height, "original_width": upright[0], "original_height": upright[1]}
    facts |= {"original_format": name.lower(), "exif": _exif_text(exif), "colour": colour}
    return Decoded(image, facts | ({"phash": _phash(rgb)} if spec.hash else {}))


def _colour(opened: Any) -> str | None:
    """What conversion to a plain RGB image takes away."""
    mode = opened.mode
    found = {
        "animated": getattr(opened, "n_frames", 1) > 1,
        "alpha": mode in WITH_ALPHA or "transparency" in opened.info,
        "cmyk": mode == "CMYK",
        "deep": mode.startswith(DEEP),
        "grey": mode in ("1", "L", "LA", "La") or mode.startswith(DEEP),
        "palette": mode in ("P", "PA"),
    }
    return " ".join(sorted(word for word, holds in found.items() if holds)) or None


def _phash(ppm: bytes) -> str | None:
    """As `image_hash.phash`: 16 hex digits; None where the image is blank."""
    import numpy as np

    from filters.image_hash import hashes

    return hashes(_pixels(np.frombuffer(ppm, np.uint8))).get("phash")


def _check_size(size: tuple[int, int], spec: DecodeSpec) -> None:
    if size[0] * size[1] > spec.max_pixels:
        raise Refusal("too_many_pixels")
    if min(size) < spec.min_side_px:
        raise Refusal("too_small")


def _normalise(opened: Any, orientation: object) -> tuple[tuple[int, int], bytes]:
    """The upright size, and the first frame as `_ppm`."""
    from PIL import Image

    image = opened
    image.load()
    if image.mode.startswith(DEEP):  # 16 bits and more: keep the upper eight
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        layered = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    image = image if image.mode == "RGB" else image.convert("RGB")
    if orientation in TURNS:
        image = image.transpose(Image.Transpose[TURNS[orientation]])
    return image.size, _ppm(image)


def _kind_of(data: bytes) -> str:
    """What stands in the place of an image."""
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<svg", b"<?xml")) or b"<svg" in head:
        return "svg"
    return "html" if head.startswith((b"<!doctype", b"<html", b"<head", b"<body")) else "not_an_image"


def _exif_text(exif: Any) -> str | None:
    """The plain tags as JSON (no location, no binary fields), cut off where it grows long."""
    from PIL import ExifTags

    plain = {ExifTags.TAGS.get(tag, str(tag)): value for tag, value in exif.items() if isinstance(value, str | int)}
    plain.pop("GPSInfo", None)
    text = json.dumps(plain, sort_keys=True)
    return text if plain and len(text) <= EXIF_CHARS else None


def serve() -> None:
    """The life of a decoder process: after a frame of settings one of each image comes in, and for each goes out one of
    facts as JSON and the encoded image, in the same order."""
    warnings.simplefilter("ignore")  # Pillow's, on every damaged file
    spec = DecodeSpec(**json.loads(_receive()))
    resize = load_resizer(spec)
    if spec.hash:
        import filters.image_hash  # noqa: F401  # before the memory is limited
    limit_memory(BASE_BYTES + spec.max_pixels * BYTES_PER_PIXEL)
    for pipe in (0, 1):  # room for several images, so that nobody waits for the other's turn on a core
        with contextlib.suppress(OSError):  # a user has so many pages of pipes in all
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not reach the pipe
    _send(out, {"ready": True}, b"")
    while True:
        data = _receive()
        try:
            image, facts = decode(data, spec, resize)
            _send(out, facts, image)
        except Refusal as refusal:
            _send(out, {"reason": str(refusal)}, b"")
        except MemoryError:
            _send(out, {"reason": "memory"}, b"")


def _receive() -> bytes:
    head = sys.stdin.buffer.read(FRAME.size)
    if len(head) < FRAME.size:
        raise SystemExit
    return sys.stdin.buffer.read(FRAME.unpack(head)[0])


def _send(out: Any, facts: dict[str, Any], data: bytes) -> None:
    text = json.dumps(facts).encode()
    out.write(FRAME.pack(len(text), len(data)) + text + data)
    out.flush()


if __name__ == "__main__":
    serve()
