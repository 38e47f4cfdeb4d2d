import numpy as np
import pytest

from workbench.zoo import shapes
from workbench.zoo.scoring import rate, score
from workbench.zoo.shapes import Scene, Thing, Wording, parse, read


def image_of(*things, ground="dark"):
    return read(shapes.render(Scene(things, ground)))


RED_CIRCLE = Thing("red", "circle", "large", (17.0, 32.0), 13.0, "left")
BLUE_SQUARE = Thing("blue", "square", "small", (47.0, 32.0), 8.0, "right")
BLUE_CIRCLE = Thing("blue", "circle", "large", (17.0, 32.0), 13.0, "left")
RED_SQUARE = Thing("red", "square", "small", (47.0, 32.0), 8.0, "right")


def test_every_word_of_a_scene_is_scored_right_on_its_own_image():
    rng = np.random.default_rng(1)
    for scene in [shapes.sample(rng) for _ in range(100)]:
        wording = Wording(places=("none", "each", "relation")[rng.integers(3)])
        assert score(parse(scene.prompt(wording)), read(shapes.render(scene))).all_right


def test_swapped_colours_are_right_in_colour_and_shape_but_not_bound():
    found = score(parse("a red circle and a blue square"), image_of(BLUE_CIRCLE, RED_SQUARE))
    assert (found.colours, found.shapes, found.bound) == (True, True, False)
    assert not found.all_but_places


@pytest.mark.parametrize(
    ("prompt", "row", "right"),
    [
        ("a small red circle and a blue square", "sizes", False),
        ("a large red circle and a blue square", "sizes", True),
        ("a red circle and a blue square", "sizes", None),
        ("a red circle and a blue square on a light background", "ground", False),
        ("a red circle and a blue square on a dark background", "ground", True),
        ("a red circle right of a blue square", "places", False),
        ("a blue square right of a red circle", "places", True),
        ("a red circle above a blue square", "places", False),
        ("a red circle", "count", False),
        ("a red circle and a green square", "colours", False),
        ("a red circle and a blue cross", "shapes", False),
    ],
)
def test_each_word_is_scored_by_itself(prompt, row, right):
    found = score(parse(prompt), image_of(RED_CIRCLE, BLUE_SQUARE))
    assert getattr(found, row) is right
    assert found.all_right is (right is not False)


def test_nothing_on_the_image_is_nothing_right():
    found = score(parse("a large red circle on the left"), image_of())
    assert (found.count, found.bound, found.sizes, found.places) == (False, False, False, False)


def test_a_rate_counts_only_what_was_asked():
    assert rate([True, None, False, True, None, True]) == (0.75, 4)
    assert rate([None])[1] == 0
