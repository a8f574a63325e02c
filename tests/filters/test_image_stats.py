"""What `image_stats` says about an image."""

import cv2
import numpy as np
import pytest

from filters.base import Batch
from filters.image_stats import ImageStats, borders, colourfulness, look
from tests.filters.shards import draw


def test_a_blank_image_has_no_entropy_and_no_sharpness() -> None:
    assert look(np.full((20, 30, 3), 200, np.uint8)) == (0.0, 0.0, 1.0, 1.0, 0.0)


def test_two_equal_halves_are_one_bit() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:, 8:] = 255
    entropy, sharpness, blankness, *_ = look(image)
    assert entropy == pytest.approx(1.0)
    assert blankness == pytest.approx(0.5)
    assert sharpness > 0


def test_blurring_lowers_the_sharpness() -> None:
    image = draw(1)
    assert look(cv2.GaussianBlur(image, (7, 7), 2))[1] < look(image)[1] / 4


def test_black_bars_are_borders_even_as_jpeg() -> None:
    picture = draw(3, 192, 256)
    film = cv2.copyMakeBorder(picture, 32, 32, 0, 0, cv2.BORDER_CONSTANT)
    assert borders(picture) < 0.02
    assert borders(film) == pytest.approx(0.25, abs=0.02)
    assert borders(film.transpose(1, 0, 2).copy()) == pytest.approx(0.25, abs=0.02)
    jpeg = cv2.imdecode(cv2.imencode(".jpg", film, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_COLOR)
    assert borders(jpeg) == pytest.approx(0.25, abs=0.05)


def test_a_frame_counts_on_all_four_sides_and_a_sky_is_no_border() -> None:
    framed = cv2.copyMakeBorder(draw(3, 80, 80), 10, 0, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    framed = cv2.copyMakeBorder(framed, 0, 10, 5, 15, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    assert borders(framed) == pytest.approx(0.36, abs=0.02)
    sky = np.repeat(np.linspace(60, 250, 100).astype(np.uint8), 300).reshape(100, 100, 3)
    assert borders(sky) < 0.2


def test_grey_has_no_colour_and_red_beside_blue_has_much() -> None:
    """Half red, half blue: the opponents are (255, 127.5) and (0, -255), so spread √(127.5² + 191.25²) = 229.9 and
    mean √(127.5² + 63.75²) = 142.5."""
    grey = np.repeat(draw(1)[:, :, :1], 3, axis=2)
    assert colourfulness(grey) == 0
    image = np.zeros((10, 10, 3), np.uint8)
    image[:5, :, 0] = image[5:, :, 2] = 255
    assert colourfulness(image) == pytest.approx(229.85 + 0.3 * 142.55, abs=0.1)
    assert colourfulness(draw(1)) > 10


def test_sides_are_those_of_the_image_as_found() -> None:
    columns = {"original_width": [300, 0], "original_height": [200, 10], "original_bytes": [1234, None]}
    found = ImageStats().score(Batch(["a", "b"], columns, [draw(1, 20, 30), None]))
    assert (found["width_px"][0], found["height_px"][0], found["shorter_side_px"][0]) == (300, 200, 200)
    assert found["aspect"][0] == 1.5
    assert found["size_bytes"][0] == 1234
    assert found["aspect"][1] is None and found["entropy"][1] is None


def test_without_looking_sides_are_told_and_no_image_is_needed() -> None:
    blind = ImageStats(looks=False)
    assert "pixels" not in blind.needs and "entropy" not in blind.columns
    columns = {"original_width": [640, None], "original_height": [320, None], "original_bytes": [9, None]}
    made = blind.score(Batch(["a", "b"], columns))
    assert set(made) == set(blind.columns) and made["aspect"] == [2.0, None] and made["shorter_side_px"] == [320, None]
