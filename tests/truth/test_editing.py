"""Whether prompt-to-prompt keeps an object's place, on the shipped model."""

from workbench.models.model import DiffusionModel
from workbench.truth.editing import Kept, kept_places

CIRCLES = {"shape": "circle", "colour": "blue"}


def test_a_circle_stays_where_it_was_and_a_plain_change_moves_it():
    model = DiffusionModel("shapes-unet")
    found = kept_places(model, "a red circle", "a blue circle", seeds=range(3), **CIRCLES)
    assert found.pictures == 3
    assert found.edited > 0.5 > found.plain
    assert found.coloured == 1
    assert f"{found.edited:.3f}" in str(found)


def test_pictures_without_the_object_are_not_counted():
    model = DiffusionModel("shapes-unet")
    found = kept_places(model, "a red square", "a blue square", seeds=[0], num_inference_steps=3, **CIRCLES)
    assert found == Kept(0.0, 0.0, 0.0, 0.0, 0)
