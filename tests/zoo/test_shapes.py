import subprocess
import sys

import numpy as np
import pytest

from workbench.errors import InputError, UnknownNameError
from workbench.zoo import shapes
from workbench.zoo.shapes import AskedThing, Scene, Thing, Wording


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(5)
    return [shapes.sample(rng) for _ in range(1500)]


def two(place="left", other="right"):
    red = Thing("red", "circle", "large", (17.0, 32.0), 13.0, place)
    blue = Thing("blue", "square", "small", (47.0, 32.0), 8.0, other)
    return Scene((red, blue), "dark")


@pytest.mark.parametrize("module", ["workbench.zoo", "workbench.zoo.shapes"])
def test_importing_the_world_loads_no_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split()[0] == "False"


def test_the_same_seed_draws_the_same_scenes_and_another_seed_others():
    draw = lambda seed: [shapes.sample(np.random.default_rng(seed)) for _ in range(3)]  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_drawn_circle_covers_its_area_in_its_colour():
    scene = Scene((Thing("blue", "circle", "large", (32.0, 30.0), 13.0, "middle"),), "light")
    image = shapes.render(scene)
    mask = shapes.masks(scene)[0]
    assert image.shape == (64, 64, 3)
    assert image.dtype == np.uint8
    assert mask.sum() == pytest.approx(np.pi * 13**2, rel=0.02)
    assert tuple(image[30, 32]) == shapes.RGB["blue"]
    assert tuple(image[0, 0]) == shapes.GROUND_RGB["light"]
    assert np.argwhere(mask).mean(axis=0) + 0.5 == pytest.approx((30.0, 32.0), abs=0.1)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_the_mask_is_where_the_picture_is_more_thing_than_ground(shape):
    scene = Scene((Thing("red", shape, "large", (31.3, 33.6), 13.0, "middle"),), "dark")
    image = shapes.render(scene).astype(float)
    to_thing = np.linalg.norm(image - shapes.RGB["red"], axis=-1)
    to_ground = np.linalg.norm(image - shapes.GROUND_RGB["dark"], axis=-1)
    differ = shapes.masks(scene)[0] ^ (to_thing <= to_ground)
    assert differ.sum() <= 2


def test_rendering_many_is_rendering_each(scenes):
    some = scenes[:20]
    assert np.array_equal(shapes.render_many(some), np.stack([shapes.render(scene) for scene in some]))


def test_masks_of_two_objects_never_meet_and_keep_off_the_border(scenes):
    for scene in scenes:
        masks = shapes.masks(scene)
        assert masks.sum(axis=0).max() == 1
        edge = masks.copy()
        edge[:, 1:-1, 1:-1] = False
        assert edge.sum() <= 2  # the corner of a shape may touch it
        assert masks.sum(axis=(1, 2)).min() > 60


def test_what_is_held_out_is_never_drawn_unless_asked_for(scenes):
    pairs = {thing.pair for scene in scenes for thing in scene.things}
    assert pairs == {(c, s) for c in shapes.COLOURS for s in shapes.SHAPES} - shapes.HELD_OUT_PAIRS
    combinations = {frozenset(thing.pair for thing in scene.things) for scene in scenes}
    assert not combinations & shapes.HELD_OUT_COMBINATIONS
    rng = np.random.default_rng(0)
    held = [shapes.sample(rng, held_out=True) for _ in range(300)]
    assert all(scene.held_out for scene in held)
    seen = {thing.pair for scene in held for thing in scene.things}
    assert seen >= shapes.HELD_OUT_PAIRS
    assert {frozenset(t.pair for t in scene.things) for scene in held} >= shapes.HELD_OUT_COMBINATIONS


def test_half_of_a_held_out_combination_occurs_in_training(scenes):
    drawn = {thing.pair for scene in scenes for thing in scene.things}
    for combination in shapes.HELD_OUT_COMBINATIONS:
        assert combination <= drawn


@pytest.mark.parametrize(
    ("wording", "prompt"),
    [
        (Wording(), "a large red circle and a small blue square on a dark background"),
        (Wording(sizes=False, ground=False), "a red circle and a blue square"),
        (
            Wording(sizes=False, ground=False, places="each"),
            "a red circle on the left and a blue square on the right",
        ),
        (Wording(sizes=False, places="relation"), "a red circle left of a blue square on a dark background"),
    ],
)
def test_a_scene_is_said_with_the_words_asked_for(wording, prompt):
    assert two().prompt(wording) == prompt


def test_parse_reads_back_every_prompt_that_training_says(scenes):
    rng = np.random.default_rng(9)
    for scene in scenes:
        wording = shapes.sample_wording(rng)
        asked = shapes.parse(scene.prompt(wording))
        assert asked.ground == (scene.ground if wording.ground else None)
        told = wording.places == "each" or (wording.places == "relation" and len(scene.things) == 2)
        for wanted, thing in zip(asked.things, scene.things, strict=True):
            size = thing.size if wording.sizes else None
            assert wanted == AskedThing(*thing.pair, size, thing.place if told else None)


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        ("a red circle above a blue square", "top", "bottom"),
        ("a red circle right of a blue square", "right", "left"),
        ("a red circle at the bottom and a blue square at the top", "bottom", "top"),
    ],
)
def test_parse_understands_places(prompt, first, second):
    assert [thing.place for thing in shapes.parse(prompt).things] == [first, second]


def test_parse_names_the_nearest_word_to_one_it_does_not_know():
    with pytest.raises(UnknownNameError, match=r"'circel'.*'circle'"):
        shapes.parse("a red circel")


@pytest.mark.parametrize(
    "prompt", ["", "a circle", "red and blue", "a red circle and a blue cross and a red cross"]
)
def test_parse_refuses_what_names_no_objects(prompt):
    with pytest.raises(InputError, match="as in 'a"):
        shapes.parse(prompt)


def test_a_colour_outside_the_world_is_refused():
    with pytest.raises(InputError, match=r"'yelow'.*'yellow'"):
        Thing("yelow", "circle", "small", (32.0, 32.0), 8.0, "middle")
    with pytest.raises(InputError, match="1 or 2"):
        shapes.sample(np.random.default_rng(0), objects=3)


def test_twins_are_two_of_one_kind_and_nothing_else():
    rng = np.random.default_rng(0)
    scenes = [shapes.sample(rng, twins=True) for _ in range(40)]
    assert all(scene.twins and not scene.held_out for scene in scenes)
    assert not any(shapes.sample(rng).twins for _ in range(200))
    for asked in ({"held_out": True}, {"objects": 1}):
        with pytest.raises(InputError, match="Twins"):
            shapes.sample(rng, twins=True, **asked)
