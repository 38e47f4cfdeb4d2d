"""How far apart two pictures are, and what one of the shapes world shows."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from workbench.errors import InputError, UnknownNameError
from workbench.experiments.metrics import (
    colour,
    difference,
    difference_image,
    iou,
    mask_iou,
    pixels,
    psnr,
    shape,
    ssim,
    towards,
)
from workbench.zoo import shapes


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


def noise(seed, size=24):
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def test_psnr_is_in_decibels_of_the_squared_error():
    assert psnr(grey(0), grey(255)) == 0.0
    assert psnr(grey(100), grey(151)) == pytest.approx(-20 * math.log10(51 / 255), abs=1e-5)
    assert psnr(grey(7), grey(7)) == math.inf


def test_ssim_is_the_mean_of_the_papers_formula_over_whole_windows():
    one, other = noise(0), noise(1)
    offsets = np.arange(11) - 5
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights = (weights / weights.sum())[..., None]
    found = []
    for row in range(14):
        for column in range(14):
            x, y = (each[row : row + 11, column : column + 11] / 255 for each in (one, other))
            mx, my = (weights * x).sum((0, 1)), (weights * y).sum((0, 1))
            vx, vy = (weights * (x - mx) ** 2).sum((0, 1)), (weights * (y - my) ** 2).sum((0, 1))
            both = (weights * (x - mx) * (y - my)).sum((0, 1))
            found.append(
                (2 * mx * my + 1e-4) * (2 * both + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
            )
    images = Image.fromarray(one), Image.fromarray(other)
    assert ssim(*images) == pytest.approx(np.mean(found), abs=1e-5)
    assert ssim(images[0], images[0]) == pytest.approx(1)
    assert abs(ssim(*images)) < 0.1


def drawn(*things):
    return Image.fromarray(shapes.render(shapes.Scene(tuple(things), "dark")))


RED_CIRCLE = shapes.Thing("red", "circle", "small", (18, 32), 9, "left")
BLUE_SQUARE = shapes.Thing("blue", "square", "small", (46, 32), 9, "right")


def test_colour_and_shape_are_as_read():
    image = drawn(RED_CIRCLE, BLUE_SQUARE)
    assert [colour(image, each) for each in ("red", "blue", "green")] == [1, 1, 0]
    assert [colour(image, "red", shape=each) for each in ("circle", "square")] == [1, 0]
    assert [shape(image, each) for each in ("circle", "cross")] == [1, 0]
    assert shape(image, "square", colour="blue") == 1
    assert shape(image, "square", colour="red") == 0
    with pytest.raises(UnknownNameError, match=r"no 'reed'.*'red'"):
        colour(image, "reed")
    with pytest.raises(UnknownNameError, match="'circle'"):
        colour(image, "red", shape="circel")


def test_masks_of_things_meet_where_the_things_do():
    one = drawn(RED_CIRCLE)
    assert mask_iou(one, drawn(replace(RED_CIRCLE, colour="green"))) > 0.95
    assert mask_iou(one, drawn(replace(RED_CIRCLE, centre=(46, 32), place="right"))) == 0
    assert 0.4 < mask_iou(one, drawn(RED_CIRCLE, BLUE_SQUARE)) < 0.7
    assert mask_iou(grey(0, (64, 64)), grey(0, (64, 64))) == 0
    assert iou(np.array([True, True, False]), np.array([False, True, False])) == 0.5


@pytest.mark.parametrize("compare", [difference, psnr, ssim, difference_image])
def test_pictures_of_other_sizes_are_refused(compare):
    with pytest.raises(InputError, match=r"12 × 12 pixels and 24 × 12 pixels"):
        compare(grey(0, (12, 12)), grey(0, (24, 12)))
    if compare is ssim:
        with pytest.raises(InputError, match="4 × 2 pixels are too few"):
            compare(grey(0), grey(0))
