"""The rates of a patch and its controls, on the shipped model."""

import pytest
from PIL import Image

from workbench.experiments.experiment import Experiment
from workbench.experiments.site_changes import PatchSpec
from workbench.models.model import DiffusionModel
from workbench.truth.__main__ import ELSEWHERE, PATCH, STEPS
from workbench.truth.patching import Rates, colour_rates, has_colour
from workbench.zoo import shapes


def rates_of(patch, elsewhere, **asked):
    experiment = Experiment(
        model="shapes-unet",
        source="a red circle",
        target="a blue circle",
        num_inference_steps=20,
        guidance_scale=3.0,
        interventions=(patch,),
        **asked,
    )
    model = DiffusionModel("shapes-unet")
    return colour_rates(model, experiment, colour="red", elsewhere=elsewhere, seeds=[0, 1])


@pytest.fixture(scope="module")
def rates():
    return rates_of(PatchSpec(site="unet.up_blocks.2", branch="cond"), "unet.mid_block")


def test_sources_are_red_and_targets_are_not(rates):
    assert (rates.seeds, rates.source, rates.target) == (2, 2, 0)


def test_patch_of_the_last_block_carries_the_colour_and_its_norm_does_not(rates):
    assert rates.patched == 2
    assert rates.random == 0


def test_colour_enters_through_one_layer_and_late():
    """Half of the steps are enough where the source's circle lies where the target's does."""
    found = rates_of(PATCH, ELSEWHERE, source_from=STEPS[0])
    assert len(STEPS) <= 10
    assert (found.source, found.target) == (2, 0)
    assert (found.patched, found.elsewhere, found.random) == (2, 0, 0)


def test_rates_are_written_as_a_table():
    text = str(Rates(seeds=9, source=9, target=0, patched=8, elsewhere=1, random=2))
    assert [line.split()[-3:] for line in text.splitlines()] == [
        [count, "of", "9"] for count in ("9", "0", "8", "1", "2")
    ]


def test_a_picture_has_a_colour_if_it_is_of_one_thing():
    white = Image.new("RGB", (64, 64), "white")
    assert not has_colour(white, "red")
    assert shapes.read(white).things == () or not shapes.read(white).things
