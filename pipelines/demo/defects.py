"""The defects of the demo web: how often each is planned, and the bytes that make it.

Text defects are made in `texts`; what only a server can do (status, header, delay) becomes a route. The two bombs
are written without ever holding what they unpack to: a deflate stream that is flushed fully repeats byte for byte,
so one block of zeros is compressed and its output repeated.
"""

import struct
import zlib
from collections.abc import Iterator

import cv2
import numpy as np

# Shares of all scenes of the web, fixed before any filter was measured on it. Each falls on scenes of its own.
RATES: dict[str, float] = {
    "boilerplate": 0.04,
    "file_name": 0.03,
    "foreign": 0.05,
    "tiny_icon": 0.02,
    "broken": 0.01,  # a page of HTML, or noise, under an image's name and type
    "truncated": 0.01,  # the first 30 to 70 % of an image's bytes
    "not_found": 0.02,
    "redirect": 0.02,  # 301 to where the image is: nothing wrong with the pair
    "robots_forbidden": 0.015,  # below /private/, which robots.txt forbids
    "noai_page": 0.01,
    "noai_header": 0.01,
    "slow": 0.01,  # on a host that takes SLOW_S for every response
}
# Beyond these: so many URLs that repeat an ordinary scene, as a share of all scenes.
COPY_RATES: dict[str, float] = {"exact_duplicate": 0.03, "near_duplicate": 0.04}
# Traps are few: one of each would do, two show that the second is met like the first.
TRAPS: dict[str, int] = {"redirect_loop": 2, "redirect_private": 2, "drip": 2, "png_bomb": 2, "gzip_bomb": 2}

SLOW_S = 0.25
DRIP_S, DRIP_BYTES = 0.5, 600  # a byte each half second, for five minutes
BOMB_SIDE_PX = 25_000  # at 4 bits a pixel 312 MB of rows, in 305 kB
BODY_BOMB_BYTES = 1 << 29
PRIVATE_TARGET = "http://169.254.169.254/latest/meta-data/"


def encode(picture: np.ndarray, extension: str, quality: int) -> bytes:
    """RGB uint8 to the bytes of a jpg, webp or png; `quality` 0 to 100 is for the first two."""
    settings = {
        "jpg": [cv2.IMWRITE_JPEG_QUALITY, quality],
        "webp": [cv2.IMWRITE_WEBP_QUALITY, quality],
        "png": [cv2.IMWRITE_PNG_COMPRESSION, 2],
    }[extension]
    done, data = cv2.imencode(f".{extension}", np.ascontiguousarray(picture[:, :, ::-1]), settings)
    assert done
    return data.tobytes()


def near_copy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same picture for an eye: 2 to 4 % of each side cut off, and scaled to 65 to 135 % of its size."""
    height, width = picture.shape[:2]
    cut_y, cut_x = int(np.ceil(rng.uniform(0.02, 0.04) * height)), int(np.ceil(rng.uniform(0.02, 0.04) * width))
    top, left = int(rng.integers(cut_y + 1)), int(rng.integers(cut_x + 1))
    cropped = picture[top : top + height - cut_y, left : left + width - cut_x]
    scale = float(rng.uniform(0.65, 0.9) if rng.random() < 0.6 else rng.uniform(1.1, 1.35))
    return cv2.resize(cropped, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def icon(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture shrunk to an icon of 16 to 32 px a side."""
    side = int(rng.integers(16, 33))
    return cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA)


def broken(rng: np.random.Generator) -> bytes:
    if rng.random() < 0.5:
        return (
            b"<!doctype html><html><head><title>Sorry</title></head><body><p>This picture has moved.</p></body></html>"
        )
    return rng.bytes(int(rng.integers(500, 5000)))


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(len(data) * rng.uniform(0.3, 0.7))]


def _zeros(total: int, block: int, wbits: int) -> Iterator[bytes]:
    """A raw deflate stream of `total` zero bytes in whole blocks; the last block is empty and ends it."""
    assert total % block == 0
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    piece = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    yield from (piece for _ in range(total // block))
    yield b"\x03\x00"


def png_bomb(side_px: int = BOMB_SIDE_PX) -> bytes:
    """A valid grey PNG (4 bits a pixel) of side_px x side_px black pixels; a multiple of 100."""
    rows = 100
    block = rows * (1 + (side_px + 1) // 2)  # a filter byte before each row
    total = block * (side_px // rows)
    # adler32 of n zero bytes: the first sum stays 1, the second counts to n
    adler = struct.pack(">HH", total % 65521, 1)
    stream = b"\x78\xda" + b"".join(_zeros(total, block, -15)) + adler
    header = struct.pack(">IIBBBBB", side_px, side_px, 4, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stream), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def gzip_bomb(total: int = BODY_BOMB_BYTES) -> bytes:
    """A gzip body that unpacks to `total` zero bytes (a multiple of 1 MiB), about a thousandth of that long."""
    block, crc = 1 << 20, 0
    for _ in range(total // block):
        crc = zlib.crc32(bytes(block), crc)
    head = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"
    return head + b"".join(_zeros(total, block, -15)) + struct.pack("<II", crc, total & 0xFFFFFFFF)
