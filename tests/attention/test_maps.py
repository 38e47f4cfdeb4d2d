"""A word's map: which columns, which call, which layers, and how they lie on the image."""

import pytest
import torch

from workbench.attention.maps import AttentionMaps, as_image, resize
from workbench.attention.words import Word
from workbench.errors import InputError, UnknownNameError
from workbench.tracing.ledger import Row


def row(call, step):
    return Row(
        call=call, tick=call, step=step, timestep=1.0, sigma=None, branches=("cond",), component="unet"
    )


@pytest.fixture
def maps():
    draw = torch.Generator().manual_seed(0)
    fine, coarse = torch.rand(3, 4, 24, generator=draw), torch.rand(3, 4, 6, generator=draw)
    words = [Word("start", (0,), special=True), Word("red", (1,)), Word("circle", (2, 3))]
    # Step 1 has two calls, as with a second-order scheduler.
    return AttentionMaps({"fine": fine, "coarse": coarse}, [row(0, 0), row(1, 1), row(2, 1)], words)


SIZE = (48, 32)


def test_word_of_one_token_is_its_column(maps):
    assert torch.equal(maps.map("red", step=0, size=SIZE, layer="fine"), maps.layers["fine"][0, 1].view(4, 6))


def test_word_of_two_tokens_is_their_sum(maps):
    expected = (maps.layers["coarse"][0, 2] + maps.layers["coarse"][0, 3]).view(2, 3)
    assert torch.allclose(maps.map("circle", step=0, size=SIZE, layer="coarse"), expected)


def test_step_of_two_calls_is_its_last(maps):
    found = maps.map("red", step=1, size=SIZE, layer="fine")
    assert torch.equal(found, maps.layers["fine"][2, 1].view(4, 6))
    assert not torch.equal(found, maps.layers["fine"][1, 1].view(4, 6))


def test_without_a_layer_it_is_the_mean_at_the_finest(maps):
    fine, coarse = maps.layers["fine"][0, 1].view(4, 6), maps.layers["coarse"][0, 1].view(2, 3)
    expected = (fine + resize(coarse, (4, 6))) / 2
    assert torch.allclose(maps.map("red", step=0, size=SIZE), expected)


def test_unknown_layer_word_and_step_are_refused(maps):
    with pytest.raises(UnknownNameError, match="Did you mean 'fine'"):
        maps.map("red", step=0, size=SIZE, layer="fin")
    with pytest.raises(UnknownNameError, match="Did you mean 'red'"):
        maps.map("rod", step=0, size=SIZE)
    with pytest.raises(InputError, match="kept: 0, 1"):
        maps.map("red", step=2, size=SIZE)


def test_queries_that_do_not_lie_on_the_image_are_refused():
    with pytest.raises(InputError, match="97 queries do not lie on an image of 512×512"):
        as_image(torch.zeros(97), (512, 512))


def test_resize_keeps_constants_and_the_same_shape():
    image = torch.rand(3, 4)
    assert resize(image, (3, 4)) is image
    assert torch.allclose(resize(torch.full((2, 3), 0.25), (4, 6)), torch.full((4, 6), 0.25))
