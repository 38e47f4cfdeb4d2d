"""Pictures for the widgets: lossless PNG, and signed maps whose zero is neutral."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.widgets.pictures import png, tiles


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_png_is_lossless(mode):
    depth = len(mode) if mode != "L" else 1
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, depth), np.uint8)
    image = Image.fromarray(noise.squeeze(), mode)
    assert Image.open(BytesIO(png(image))).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("channels", "size"), [(1, (5, 3)), (2, (10, 3)), (3, (10, 6)), (4, (10, 6)), (16, (10, 6))]
)
def test_channels_stand_two_abreast(channels, size):
    draw = torch.Generator().manual_seed(0)
    assert tiles(torch.randn(channels, 3, 5, generator=draw)).size == size


def test_sign_is_the_colour_and_zero_is_neutral():
    shown = np.asarray(tiles(torch.tensor([[[-1.0, 0.0, 1.0]]]))).astype(int)[0]
    low, zero, high = shown
    assert low[2] > low[0]
    assert high[0] > high[2]
    assert zero.max() - zero.min() <= 5
    assert zero.min() > 240


def test_one_scale_holds_for_all_channels():
    strong, weak = torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), 0.1)
    shown = np.asarray(tiles(torch.cat([strong, weak]))).astype(int)
    alone = np.asarray(tiles(weak)).astype(int)
    assert shown[0, 0].tolist() == alone[0, 0].tolist()
    assert shown[0, 4].tolist() != alone[0, 0].tolist()


def test_all_zero_is_a_neutral_picture():
    shown = np.asarray(tiles(torch.zeros(4, 2, 2)))
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) == 1


def test_of_many_channels_the_first_component_comes_first():
    pattern = torch.linspace(-1, 1, 16).view(1, 4, 4)
    latents = torch.randn(16, 1, 1, generator=torch.Generator().manual_seed(0)) * pattern
    shown = np.asarray(tiles(latents)).astype(int)
    first, others = shown[:4, :4], shown[:4, 4:]
    assert np.abs(first[0, 0] - first[3, 3]).max() > 90
    assert others.min() > 235
