"""How far apart two pictures are."""

import numpy as np
import pytest
from PIL import Image

from workbench.experiments.metrics import difference, difference_image, pixels, towards


def grey(level, size=(4, 2)):
    return Image.new("RGB", size, (level, level, level))


def test_difference_is_the_mean_over_pixels_and_channels():
    assert difference(grey(0), grey(255)) == 1.0
    assert difference(grey(10), grey(10)) == 0.0
    one = grey(0)
    one.putpixel((0, 0), (255, 0, 0))
    assert difference(grey(0), one) == pytest.approx(1 / 24)


@pytest.mark.parametrize(("level", "moved"), [(0, 0.0), (200, 1.0), (50, 0.25), (100, 0.5)])
def test_towards_goes_from_target_to_source(level, moved):
    assert towards(grey(level), target=grey(0), source=grey(200)) == pytest.approx(moved)


def test_farther_from_the_source_than_the_target_is_negative():
    assert towards(grey(50), target=grey(100), source=grey(200)) == pytest.approx(-0.5)


def test_a_change_elsewhere_does_not_move_towards_the_source():
    target, source, elsewhere = grey(0), grey(0), grey(0)
    source.putpixel((0, 0), (200, 0, 0))
    elsewhere.putpixel((3, 1), (200, 200, 200))
    assert towards(elsewhere, target, source) == 0.0
    assert towards(source, target, source) == pytest.approx(1.0)


def test_where_source_and_target_are_the_same_nothing_moves():
    assert towards(grey(50), target=grey(100), source=grey(100)) == 0.0


def test_difference_image_is_the_largest_channel():
    one = grey(0)
    one.putpixel((3, 1), (10, 20, 5))
    found = np.asarray(difference_image(grey(0), one))
    assert found.shape == (2, 4)
    assert found[1, 3] == 20
    assert found.sum() == 20


def test_any_mode_is_read_as_rgb():
    assert pixels(Image.new("L", (3, 2), 255)).shape == (2, 3, 3)
    assert pixels(Image.new("RGBA", (3, 2), (255, 0, 0, 9)))[0, 0].tolist() == [1.0, 0.0, 0.0]
