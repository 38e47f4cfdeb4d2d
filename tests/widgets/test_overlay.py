"""Maps as the scrubber takes them: bytes, scales and words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from workbench.attention.maps import AttentionMaps
from workbench.attention.words import Word
from workbench.tracing.ledger import Row
from workbench.widgets.overlay import overlay
from workbench.widgets.scrubber import StepScrubber

SIZE = (48, 32)
WORDS = [
    Word("start", (0,), special=True),
    Word("red", (1,)),
    Word("zebra", (2, 3)),
    Word("end", (4,), special=True),
    Word("padding", (5,), special=True),
    Word("padding", (6,), special=True),
]


def row(call, step):
    return Row(call=call, tick=call, step=step, timestep=1.0, sigma=None, branches=("cond",), component="u")


def maps(**layers):
    return AttentionMaps(layers, [row(0, 0), row(1, 1), row(2, 1)], WORDS)


@pytest.fixture
def made():
    draw = torch.Generator().manual_seed(0)
    return maps(fine=torch.rand(3, 7, 24, generator=draw), coarse=torch.rand(3, 7, 6, generator=draw))


def shown(made):
    given = overlay(made, lane=1, size=SIZE)
    data = np.frombuffer(given["data"], np.uint8).reshape(given["shape"]).astype(float)
    return given, data / 255 * np.array(given["scales"])[:, None, :, None, None]


def test_words_have_their_padding_as_one(made):
    given, values = shown(made)
    assert [token["text"] for token in given["tokens"]] == ["start", "red", "zebra", "end", "padding"]
    assert [token["special"] for token in given["tokens"]] == [True, False, False, True, True]
    assert [token["index"] for token in given["tokens"]] == [0, 1, 2, 3, 4]
    assert given["layers"] == ["all layers", "fine", "coarse"]
    assert given["lane"] == 1
    assert given["shape"] == [3, 2, 5, 4, 6]
    padding = made.layers["fine"][0, [5, 6]].sum(0).view(4, 6).numpy()
    assert np.abs(values[1, 0, 4] - padding).max() <= 2 / 255


@pytest.mark.parametrize(("layer", "index"), [(None, 0), ("fine", 1), ("coarse", 2)])
def test_values_are_the_words_maps(made, layer, index):
    _, values = shown(made)
    for step in (0, 1):
        for place, word in enumerate(("red", "zebra"), start=1):
            expected = made.map(word, step=step, size=SIZE, layer=layer)
            if layer == "coarse":
                continue
            assert np.abs(values[index, step, place] - expected.numpy()).max() <= 2 / 255


def test_step_of_two_calls_is_its_last(made):
    _, values = shown(made)
    last, first = (made.layers["fine"][call, 1].view(4, 6).numpy() for call in (2, 1))
    assert np.abs(values[1, 1, 1] - last).max() <= 1 / 255
    assert np.abs(values[1, 1, 1] - first).max() > 1 / 255


def test_scrubber_takes_it(made):
    assert StepScrubber(attention=overlay(made, lane=0, size=SIZE)).attention["lane"] == 0


def test_layer_that_does_not_lie_on_the_image_is_left_out():
    draw = torch.Generator().manual_seed(0)
    mixed = maps(fine=torch.rand(3, 7, 24, generator=draw), odd=torch.rand(3, 7, 97, generator=draw))
    assert overlay(mixed, lane=0, size=SIZE)["layers"] == ["all layers", "fine"]
    assert overlay(maps(odd=torch.rand(3, 7, 97, generator=draw)), lane=0, size=SIZE) == {}


def test_no_words_and_no_layers_are_nothing():
    assert overlay(AttentionMaps({}, [], []), lane=0, size=SIZE) == {}
    assert overlay(AttentionMaps({"a": torch.rand(1, 1, 24)}, [row(0, 0)], []), lane=0, size=SIZE) == {}


def test_fine_maps_are_shrunk():
    big = AttentionMaps({"a": torch.rand(1, 7, 128 * 192)}, [row(0, 0)], WORDS)
    rows, columns = overlay(big, lane=0, size=SIZE)["shape"][-2:]
    assert (rows, columns) == (43, 64)


def test_weights_of_zero_are_zero():
    given, values = shown(maps(fine=torch.zeros(3, 7, 24)))
    assert values.max() == 0
    assert all(scale > 0 for scales in given["scales"] for scale in scales)
    assert shown(maps(fine=torch.full((3, 7, 24), 0.5)))[1].min() > 0.49


def test_of_several_requests_the_first_of_words_is_shown_and_heads_are_averaged(made):
    fine = made.layers["fine"]
    apart = replace(made, layers={"fine": torch.stack([fine * 0.5, fine * 1.5], 1)}, reduced={})
    picture = replace(made, layers={"fine": torch.rand(3, 24, 24)}, block="image->image")
    points = replace(made, layers={"fine": fine[..., :2]}, places={"fine": (0, 5)})
    largest = replace(made, layers={"fine": fine[:, :2]}, top=2)
    given = overlay([picture, points, largest, apart], lane=1, size=SIZE)
    assert given == overlay(maps(fine=fine), lane=1, size=SIZE)
    assert overlay([picture, points, largest], lane=1, size=SIZE) == {}
    assert StepScrubber(attention=overlay(picture, lane=0, size=SIZE)).attention == {}
