import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from workbench.errors import InputError
from workbench.zoo import shapes
from workbench.zoo.shapes import Scene, Thing, read


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(3)
    scenes = [shapes.sample(rng, held_out=bool(index % 4 == 0)) for index in range(300)]
    return list(zip(scenes, shapes.render_many(scenes), strict=True))


def said(things):
    return sorted((*thing.pair, thing.size, thing.place) for thing in things)


def soft(image, rng):
    """As an image comes out of an autoencoder: a little blurred, a little noisy."""
    blurred = ndimage.gaussian_filter(image.astype(float), (0.9, 0.9, 0)) + rng.normal(0, 8, image.shape)
    return blurred.clip(0, 255).astype(np.uint8)


def share_right(pairs):
    return np.mean(
        [
            said(read(image).things) == said(scene.things) and read(image).ground == scene.ground
            for scene, image in pairs
        ]
    )


def test_the_reader_is_right_on_rendered_images(drawn):
    assert share_right(drawn) >= 0.99


def test_the_reader_is_right_on_soft_and_noisy_images(drawn):
    rng = np.random.default_rng(0)
    assert share_right([(scene, soft(image, rng)) for scene, image in drawn]) >= 0.99


def test_the_reader_is_wrong_where_the_image_shows_another_scene(drawn):
    images = [image for _, image in drawn]
    shuffled = [(scene, image) for (scene, _), image in zip(drawn, images[1:] + images[:1], strict=True)]
    assert share_right(shuffled) < 0.05


def test_masks_and_centres_are_those_drawn(drawn):
    for scene, image in drawn[:100]:
        found = {thing.pair: thing for thing in read(image).things}
        for thing, mask in zip(scene.things, shapes.masks(scene), strict=True):
            one = found[thing.pair]
            assert (mask & one.mask).sum() / (mask | one.mask).sum() > 0.85
            assert one.centre == pytest.approx(thing.centre, abs=0.6)
            assert one.misfit < 0.2


def test_touching_objects_of_two_colours_are_parted():
    things = (
        Thing("red", "square", "large", (20.0, 32.0), 13.0, "left"),
        Thing("blue", "square", "large", (42.8, 32.0), 13.0, "right"),
    )
    reading = read(shapes.render(Scene(things, "dark")))
    assert sorted(thing.pair for thing in reading.things) == [("blue", "square"), ("red", "square")]


def test_kinds_of_images_read_alike(drawn):
    _, image = drawn[0]
    expected = said(read(image).things)
    enlarged = Image.fromarray(image).resize((256, 256), Image.Resampling.NEAREST)
    for other in (Image.fromarray(image), image.astype(np.float32) / 255, enlarged):
        assert said(read(other).things) == expected


def test_an_empty_ground_holds_nothing():
    reading = read(np.full((64, 64, 3), 236, np.uint8))
    assert reading.things == ()
    assert reading.ground == "light"
    assert str(reading) == "nothing on light"


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64), np.uint8), np.full((64, 64, 3), 7.0), np.zeros((64, 64, 3), int)]
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(InputError, match="An image to read"):
        read(image)
