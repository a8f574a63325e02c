"""What `image_hash` says about two images."""

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image

from filters.base import Batch
from filters.image_hash import ImageHash, hashes
from pairs.errors import PairmillError
from tests.filters.shards import draw, encode

LONG = ("phash_256", "dhash_256", "sha256")


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


def test_the_other_hashes_see_copies_too() -> None:
    image = draw(3, 192, 256)
    own, copy, other = hashes(image), hashes(copies(image)[1]), hashes(draw(4, 192, 256))
    assert {name: len(own[name]) for name in own} == {"phash": 16, "dhash": 16} | dict.fromkeys(LONG, 64)
    for name in ("dhash", "phash_256", "dhash_256"):
        assert distance(own[name], copy[name]) * 4 < distance(own[name], other[name])


def test_a_cropped_copy_is_near_in_both_difference_hashes_and_no_stranger_is() -> None:
    images = [draw(seed, 192, 256) for seed in range(40)]
    found = [hashes(image) for image in images]
    for image, own in zip(images, found, strict=True):
        cropped = hashes(cv2.resize(image[4:-4, 5:-5], (200, 150), interpolation=cv2.INTER_AREA))
        assert distance(cropped["dhash"], own["dhash"]) <= 8 and distance(cropped["dhash_256"], own["dhash_256"]) <= 38
    assert min(distance(a["dhash_256"], b["dhash_256"]) for i, a in enumerate(found) for b in found[:i]) > 38


def test_difference_hashes_of_known_pictures() -> None:
    """Row r of the long one is bits 16r to 16r + 15, from the left; a set bit says that it grows brighter."""
    grows = np.broadcast_to(np.arange(17, dtype=np.uint8) * 10, (16, 17)).copy()
    grows[1] = grows[1, ::-1]
    grows[2, 5:] = 50
    assert hashes(np.dstack([grows] * 3))["dhash_256"] == "ffff" + "0000" + "f800" + "ffff" * 13


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


def test_only_what_is_wanted_is_made() -> None:
    some = ImageHash(only=("sha256", "phash"))
    assert list(some.columns) == ["phash", "sha256"]
    image = draw(3)
    made = some.score(Batch(["a", "b"], {}, [image, None]))
    assert made == {name: [hashes(image)[name], None] for name in some.columns}
    with pytest.raises(PairmillError, match="ahash"):
        ImageHash(only=("ahash",))
