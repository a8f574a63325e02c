"""What `image_hash` says about two images."""

import cv2
import imagehash
import numpy as np
from PIL import Image

from filters.image_hash import hashes
from tests.filters.shards import draw, encode


def distance(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


def copies(image: np.ndarray) -> list[np.ndarray]:
    """The same picture smaller, and as a JPEG of quality 60."""
    small = cv2.resize(image, (image.shape[1] * 3 // 4, image.shape[0] * 3 // 4), interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    return [small, cv2.imdecode(data, cv2.IMREAD_COLOR)]


def test_copies_stay_within_four_bits_and_strangers_far_away() -> None:
    images = [draw(seed, 192, 256) for seed in range(40)]
    found = [hashes(image)["phash"] for image in images]
    for image, own in zip(images, found, strict=True):
        assert max(distance(hashes(copy)["phash"], own) for copy in copies(image)) <= 4
    assert min(distance(a, b) for i, a in enumerate(found) for b in found[:i]) > 10


def test_dhash_and_the_long_hash_see_copies_too() -> None:
    image = draw(3, 192, 256)
    own, copy, other = hashes(image), hashes(copies(image)[1]), hashes(draw(4, 192, 256))
    assert (len(own["phash"]), len(own["dhash"]), len(own["phash_256"])) == (16, 16, 64)
    for name in ("dhash", "phash_256"):
        assert distance(own[name], copy[name]) * 4 < distance(own[name], other[name])


def test_the_sha256_sees_one_changed_pixel_and_not_the_encoding() -> None:
    image = draw(5)
    again = cv2.cvtColor(cv2.imdecode(np.frombuffer(encode(image), np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert hashes(again)["sha256"] == hashes(image)["sha256"]
    changed = image.copy()
    changed[0, 0, 0] ^= 1
    assert hashes(changed)["sha256"] != hashes(image)["sha256"]
    assert hashes(image.reshape(64, 48, 3))["sha256"] != hashes(image)["sha256"]


def test_a_blank_image_has_no_perceptual_hash() -> None:
    assert hashes(np.full((30, 30, 3), 7, np.uint8)).keys() == {"sha256"}


def test_distances_agree_with_imagehash() -> None:
    """The common implementation resizes otherwise, so bits differ a little; what is near or far does not."""
    for seed in range(10):
        image = draw(seed, 192, 256)
        theirs = str(imagehash.phash(Image.fromarray(image)))
        assert distance(theirs, hashes(image)["phash"]) <= 6
