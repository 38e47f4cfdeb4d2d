import numpy as np
import pytest

from tests.widgets import scene
from workbench.errors import InputError
from workbench.widgets.colour import coloured
from workbench.widgets.patch_map import PatchMap
from workbench.widgets.scrubber import StepScrubber
from workbench.widgets.tree import ComponentTree


def test_map_gives_back_what_it_shows():
    widget, values = scene.patch_map(), scene.effects()
    np.testing.assert_array_equal(widget.array(), values)
    assert repr(widget) == f"PatchMap(7 sites × 20 steps, {int(np.isfinite(values).sum())} computed)"


def test_map_without_values_has_none():
    widget = PatchMap(sites=["a", "b"], steps=3)
    assert np.isnan(widget.array()).all()
    assert widget.array().shape == (2, 3)


@pytest.mark.parametrize("cell", [[7, 0], [0, 20], [1], [-1, 0]])
def test_map_refuses_a_selection_outside(cell):
    widget = scene.patch_map()
    widget.set_state({"selected": cell})
    assert widget.selected == [3, 5]
    assert len(widget.rejected) == 1


def test_tree_refuses_a_path_it_does_not_have():
    widget = scene.tree()
    widget.set_state({"selected": "unet.nowhere"})
    assert widget.selected == "unet.mid_block"
    widget.set_state({"selected": "vae.decoder"})
    assert widget.selected == "vae.decoder"


def test_tree_may_be_empty():
    assert ComponentTree().fallback_html() == "<p>No model.</p>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": b"123"}, "3 bytes"),
        ({"layers": ["one"]}, "1 layers"),
        ({"scales": [[1.0]]}, "rows of 10 numbers"),
        ({"shape": [3, 20, 10, 0, 16], "data": b""}, "empty"),
    ],
)
def test_attention_that_does_not_fit_itself_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        StepScrubber(attention={**scene.attention(), **change})


def test_attention_that_lacks_a_part_is_refused():
    with pytest.raises(InputError, match="lacks data, layers, scales, shape, tokens"):
        StepScrubber(attention={"lane": 0})


def test_curve_without_a_number_is_refused():
    with pytest.raises(InputError, match="finite"):
        StepScrubber(curve=[1.0, float("nan")])


def test_colours_begin_and_end_as_viridis_does():
    made = coloured(np.array([[0.0, 1.0, np.nan]]))
    np.testing.assert_array_equal(made[0, 0], [0x44, 0x01, 0x54])
    np.testing.assert_array_equal(made[0, 1], [0xFD, 0xE7, 0x25])
    np.testing.assert_array_equal(made[0, 2], [232, 232, 232])


def test_signed_colours_are_neutral_at_zero():
    made = coloured(np.array([[-2.0, 0.0, 2.0]]), signed=True)[0].astype(int)
    assert made[1].max() - made[1].min() <= 2
    assert made[0, 2] > made[0, 0]
    assert made[2, 0] > made[2, 2]
