"""What `image_stats` says about an image."""

import cv2
import numpy as np
import pytest

from filters.base import Batch
from filters.image_stats import ImageStats, look
from tests.filters.shards import draw


def test_a_blank_image_has_no_entropy_and_no_sharpness() -> None:
    assert look(np.full((20, 30, 3), 200, np.uint8)) == (0.0, 0.0, 1.0)


def test_two_equal_halves_are_one_bit() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = 255
    entropy, sharpness, blankness = look(image)
    assert entropy == pytest.approx(1.0)
    assert blankness == pytest.approx(0.5)
    assert sharpness > 0


def test_blurring_lowers_the_sharpness() -> None:
    image = draw(1)
    assert look(cv2.GaussianBlur(image, (7, 7), 2))[1] < look(image)[1] / 4


def test_sides_are_those_of_the_image_as_found() -> None:
    columns = {"original_width": [300, 0], "original_height": [200, 10], "original_bytes": [1234, None]}
    found = ImageStats().score(Batch(["a", "b"], columns, [draw(1, 20, 30), None]))
    assert (found["width_px"][0], found["height_px"][0], found["shorter_side_px"][0]) == (300, 200, 200)
    assert found["aspect"][0] == 1.5
    assert found["size_bytes"][0] == 1234
    assert found["aspect"][1] is None and found["entropy"][1] is None
