"""A picture's noise, found, comes back to the picture; and a real picture can be patched."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
)
from PIL import Image

import workbench as wb
from tests import tiny
from workbench.errors import GuardError, InputError
from workbench.experiments.metrics import psnr
from workbench.models.decoding import Decoder


@pytest.fixture(scope="module")
def model():
    """What `shapes-unet` ships with remembers steps, so it is given DDIM."""
    opened = wb.DiffusionModel("shapes-unet")
    opened.pipeline.scheduler = DDIMScheduler.from_config(opened.pipeline.scheduler.config)
    return opened


def test_the_run_from_a_picture_s_noise_ends_at_the_picture(model):
    settings = {"num_inference_steps": 10, "guidance_scale": 1.0}
    run = model.record("a red circle", seed=3, **settings)
    found = wb.invert(model, run.images[0], "a red circle", num_inference_steps=10)
    # The last step takes noise away, so that many latents lead to one picture, and none to just this one.
    assert found.residual < 0.1
    assert psnr(found.record.images[0], run.images[0]) > 25


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (tiny.sd1, {}),
        (tiny.sd3, {"max_sequence_length": 24}),
        (tiny.flux, {"max_sequence_length": 24, "height": 16, "width": 16}),
    ],
)
def test_inversion_comes_back_on_every_kind_of_pipeline(build, arguments):
    pipeline = build()
    if build is tiny.sd1:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    model = wb.DiffusionModel(pipeline)
    size = (arguments.get("width", 64), arguments.get("height", 64))
    picture = Image.effect_noise(size, 60).convert("RGB")
    found = wb.invert(model, picture, "a red circle", num_inference_steps=4, **arguments)
    assert found.residual < 1e-3
    last = found.record.latents[-1]
    through = Decoder(model).decode(last, found.picture.size)[0]
    assert psnr(through, found.record.images[0]) > 40


@pytest.mark.parametrize(
    ("scheduler", "why"),
    [
        (EulerAncestralDiscreteScheduler, "draws noise"),
        (DPMSolverMultistepScheduler, "remembers"),
        (HeunDiscreteScheduler, "remembers"),
    ],
)
def test_a_sampler_that_cannot_be_run_backwards_is_refused(scheduler, why):
    pipeline = tiny.sd1()
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(GuardError, match=f"{scheduler.__name__}.*{why}"):
        wb.invert(wb.DiffusionModel(pipeline), Image.new("RGB", (64, 64)), "a", num_inference_steps=4)


def test_what_is_no_picture_or_takes_no_noise_is_refused(model):
    with pytest.raises(InputError, match="PIL"):
        wb.invert(model, "photo.png", "a red circle")
    with pytest.raises(InputError, match="latents"):
        wb.invert(wb.DiffusionModel("shapes-ddpm"), Image.new("RGB", (64, 64)))
    with pytest.raises(GuardError, match="guidance"):
        wb.invert(
            model, Image.new("RGB", (64, 64)), "a red circle", num_inference_steps=2, guidance_scale=4.0
        )


def test_an_experiment_on_a_picture(model, tmp_path):
    settings = {"num_inference_steps": 10, "guidance_scale": 1.0}
    model.record("a red circle", seed=3, **settings).images[0].save(tmp_path / "photo.png")
    experiment = wb.Experiment(
        model="shapes-unet",
        picture=str(tmp_path / "photo.png"),
        source="a red circle",
        target="a blue circle",
        interventions=[{"kind": "patch", "site": "unet.mid_block"}],
        **settings,
    )
    outcome = experiment.run(model)
    assert psnr(outcome.source.images[0], Image.open(tmp_path / "photo.png")) > 25
    assert torch.equal(outcome.source.initial, outcome.target.initial)
    assert outcome.patched.images[0] != outcome.target.images[0]
    assert wb.Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    with pytest.raises(InputError, match="nowhere"):
        experiment.model_copy(update={"picture": "nowhere.png"}).run(model)
    with pytest.raises(InputError, match="format='workbench'"):
        experiment.export(tmp_path / "x.py", model=model)
    with pytest.raises(InputError, match="picture"):
        experiment.plain().sweep({"site": ["unet.mid_block"], "step": [0]})
