"""Scores of map methods, on the shipped model and on maps made by hand."""

import numpy as np
import pytest

from workbench import zoo
from workbench.models.model import DiffusionModel
from workbench.truth.methods import CENTRE, CONCEPTS, DAAM, RAW, UNIFORM, Scores, compare_methods

BOX = np.zeros((4, 6), bool)
BOX[1:3, 1:4] = True


def test_a_map_that_is_the_object_scores_one_and_its_contrary_nothing():
    scores = Scores()
    scores.add("right", BOX * 1.0, BOX)
    scores.add("wrong", ~BOX * 1.0, BOX)
    scores.add("wrong", BOX * 1.0, BOX)
    assert scores.mean("right") == (1.0, 1.0)
    assert scores.mean("wrong") == (0.5, 0.5)
    assert str(scores).splitlines()[1].startswith("right")


def test_the_methods_on_the_shipped_model():
    prompts = ["a large red circle on the left", "a large blue circle on the right"]
    model = DiffusionModel("shapes-unet")
    concepts = ["circle", "square", "background"]
    found = compare_methods(model, prompts, "circle", concepts=concepts, **zoo.settings("shapes-unet"))
    layers = [name for name in found.found if name.startswith(f"{RAW}, unet.")]
    assert len(layers) == 10
    assert {RAW, DAAM, CONCEPTS, UNIFORM, CENTRE} <= set(found.found)
    for method in (RAW, DAAM, CONCEPTS):
        assert f"step 19, {method}" in found.found
        assert len([name for name in found.found if name.startswith(f"{method}, unet.")]) == 10
    assert found.mean(RAW)[0] > found.mean(UNIFORM)[0] > 0
    assert found.pictures == 2
    assert found.best(f"{RAW}, ") in [name.removeprefix(f"{RAW}, ") for name in layers]
    assert found.mean(RAW)[0] == pytest.approx(found.mean(DAAM)[0], abs=0.2)


def test_pictures_without_the_object_are_not_counted():
    model = DiffusionModel("shapes-unet")
    asked = {"shape": "triangle", "concepts": ["circle"], "num_inference_steps": 2}
    found = compare_methods(model, ["a red circle"], "circle", **asked)
    assert (found.pictures, found.mean(RAW)) == (0, (0.0, 0.0))
