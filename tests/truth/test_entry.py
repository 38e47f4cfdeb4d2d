"""The layer that words enter through, where it is known."""

import pytest

from workbench import zoo
from workbench.models.model import DiffusionModel
from workbench.truth.__main__ import red_circle_prompts
from workbench.truth.entry import Entry, named_layers, where_it_enters
from workbench.zoo.planted import PLANTED

MODELS = [name for name in ("shapes-unet", "shapes-planted") if name in zoo.models()]


@pytest.mark.parametrize("name", MODELS)
def test_the_layer_that_paints_the_colour_is_named(name):
    found = where_it_enters(
        DiffusionModel(name), "a red circle", "a blue circle", colour="red", seeds=[0], **zoo.settings(name)
    )
    assert found.named == f"unet.{PLANTED}"
    assert sum(found.layers.values()) == found.layers[found.named] == 1
    assert len(str(found).splitlines()) == 10


def test_each_method_names_a_layer():
    model = DiffusionModel(MODELS[-1])
    asked = zoo.settings(MODELS[-1]) | {"num_inference_steps": 6}
    found = named_layers(model, seeds=[0], prompts=red_circle_prompts(2), **asked)
    assert set(found) == {"patched keys and values", "raw weights", "ConceptAttention"}
    assert found["patched keys and values"] == found["ConceptAttention"] == f"unet.{PLANTED}"
    assert found["raw weights"].startswith("unet.")


def test_prompts_have_one_red_circle_and_nothing_else_red():
    for prompt in red_circle_prompts(5):
        assert "red circle" in prompt
        assert prompt.split().count("red") == prompt.split().count("circle") == 1


def test_the_layer_that_decides_most_often_is_named():
    assert Entry(4, {"a": 1, "b": 3, "c": 0}).named == "b"
