"""Metrics by name: as in code, so in JSON."""

import json

import numpy as np
import pytest
from PIL import Image

import workbench as wb
from workbench.errors import InputError, UnknownNameError
from workbench.experiments.measure import metric, names
from workbench.experiments.metrics import difference, psnr, towards
from workbench.zoo import shapes

TARGET, SOURCE, IMAGE = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for seed in range(3)
)


def test_a_metric_compares_with_the_target_unless_told_otherwise():
    assert metric("pixel")(IMAGE, target=TARGET, source=SOURCE) == difference(IMAGE, TARGET)
    assert metric("psnr", to="source")(IMAGE, source=SOURCE) == psnr(IMAGE, SOURCE)
    assert metric("psnr", to="source").needs == ("source",)
    assert metric("towards")(IMAGE, target=TARGET, source=SOURCE) == towards(IMAGE, TARGET, SOURCE)
    assert wb.metric is metric


def test_what_is_seen_in_one_picture_needs_no_other():
    scene = shapes.Scene((shapes.Thing("red", "cross", "large", (32, 32), 13, "middle"),), "light")
    drawn = Image.fromarray(shapes.render(scene))
    assert [metric("colour", wanted=each)(drawn) for each in ("red", "green")] == [1.0, 0.0]
    assert metric("shape", wanted="cross", colour="red")(drawn, target=TARGET) == 1.0


@pytest.mark.parametrize(
    "made",
    [metric("ssim"), metric("psnr", to="source"), metric("shape", wanted="cross"), metric("dino", model="x")],
    ids=lambda made: made.name,
)
def test_as_data_it_is_the_same_again(made):
    data = json.loads(json.dumps(made.as_data()))
    assert metric(data["name"], **data["arguments"]) == made


def test_a_function_is_given_the_pictures_that_it_names():
    def reddest(image, source, than=0.0):
        return np.asarray(image)[..., 0].max() / np.asarray(source)[..., 0].max() - than

    made = metric(reddest, than=1.0)
    assert made.name == "reddest"
    assert made.needs == ("source",)
    assert made(IMAGE, target=TARGET, source=SOURCE) == reddest(IMAGE, SOURCE, 1.0)
    assert metric(lambda image: 3)(IMAGE) == 3.0
    with pytest.raises(InputError, match=r"reddest is a function of your own.*psnr"):
        made.as_data()


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        (lambda: metric("psrn"), UnknownNameError, "'psnr'"),
        (lambda: metric("psnr", sigma=3), InputError, "takes to=….*was given sigma"),
        (lambda: metric("psnr", to="image"), InputError, "'target' or the 'source'"),
        (lambda: metric("colour"), InputError, "takes wanted=…, shape=….*was given nothing"),
        (lambda: metric("clip_score", text="a"), InputError, "text=…, model=…"),
        (lambda: metric("psnr")(IMAGE, source=SOURCE), InputError, "target's picture.*target=…"),
    ],
)
def test_what_does_not_fit_is_said(asked, error, said):
    with pytest.raises(error, match=said):
        asked()


def test_every_name_is_there():
    assert set(names()) == {
        *("clip_score", "colour", "dino", "lpips", "mask_iou"),
        *("pixel", "psnr", "shape", "ssim", "towards"),
    }
