"""Predicted clean samples, beside the schedulers' own wherever they give one."""

import diffusers
import pytest
import torch

from tests import tiny
from workbench.errors import ShapeError
from workbench.models.model import DiffusionModel
from workbench.tracing import prediction

OWN = [
    "EDMEulerScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
]
"""Schedulers whose step returns ``pred_original_sample``."""

LANDING = [
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
]
"""Schedulers whose last step, to noise level zero, lands on the predicted clean sample."""


def both(scheduler, **config):
    """Record a run; return what we predict and what the scheduler says, tick by tick."""
    pipeline = tiny.sd1(getattr(diffusers, scheduler), **config)
    step, theirs = pipeline.scheduler.step, []

    def watched(*args, **kwargs):
        output = step(*args, **{**kwargs, "return_dict": True})
        theirs.append(output.pred_original_sample)
        return (output.prev_sample,)

    pipeline.scheduler.step = watched
    record = DiffusionModel(pipeline).record("a red circle", num_inference_steps=6, seed=0)
    return record, torch.stack(theirs)


TAKES_SAMPLES = ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"]

PREDICTIONS = [(scheduler, kind) for scheduler in OWN for kind in ("epsilon", "v_prediction")]
PREDICTIONS += [(scheduler, "sample") for scheduler in TAKES_SAMPLES]


@pytest.mark.parametrize(("scheduler", "kind"), PREDICTIONS)
def test_pred_x0_is_the_schedulers_own(scheduler, kind):
    record, theirs = both(scheduler, prediction_type=kind)
    torch.testing.assert_close(record.pred_x0, theirs.float(), rtol=1e-4, atol=1e-4)


SET = [(name, kind) for name, kind in PREDICTIONS if name in (*TAKES_SAMPLES, "UniPCMultistepScheduler")]


@pytest.mark.parametrize(("scheduler", "kind"), [*SET, ("FlowMatchEulerDiscreteScheduler", "flow")])
def test_pred_x0_can_be_set(scheduler, kind):
    flow = kind == "flow"
    pipeline = tiny.sd3() if flow else tiny.sd1(getattr(diffusers, scheduler), prediction_type=kind)
    model, asked = DiffusionModel(pipeline), {"num_inference_steps": 4, "seed": 0}
    plain = model.record("a red circle", **asked)
    with model.generate("a red circle", **asked) as run:
        for step in run.steps[1:3]:
            run.pred_x0 = run.pred_x0 * (1.0 if step.step == 1 else 0.5)
    largest = float(plain.pred_x0.abs().max())
    assert float((run.pred_x0[1] - plain.pred_x0[1]).abs().max()) < 1e-4 * largest
    assert float((run.pred_x0[2] - 0.5 * plain.pred_x0[2]).abs().max()) < 1e-3 * largest
    assert float((run.latents[2] - plain.latents[2]).abs().max()) > 1e-2
    with pytest.raises(ShapeError, match="pred_x0"), model.generate("a red circle", **asked) as run:
        run.pred_x0 = torch.zeros(1)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DDPMScheduler"])
def test_a_scheduler_that_clips_is_followed(scheduler):
    pipeline = tiny.sd1()
    pipeline.scheduler = getattr(diffusers, scheduler)(**tiny.BETAS, clip_sample=True, clip_sample_range=0.5)
    step, theirs = pipeline.scheduler.step, []

    def watched(*args, **kwargs):
        output = step(*args, **{**kwargs, "return_dict": True})
        theirs.append(output.pred_original_sample)
        return (output.prev_sample,)

    pipeline.scheduler.step = watched
    record = DiffusionModel(pipeline).record("a red circle", num_inference_steps=3, seed=0)
    assert record.pred_x0.abs().max() == 0.5
    torch.testing.assert_close(record.pred_x0, torch.stack(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", LANDING)
def test_the_last_prediction_is_where_the_run_ends(scheduler, kind):
    config = {"prediction_type": kind, "set_alpha_to_one": True, "final_sigmas_type": "zero"}
    pipeline = tiny.sd1(getattr(diffusers, scheduler), **config)
    record = DiffusionModel(pipeline).record("a red circle", num_inference_steps=6, seed=0)
    torch.testing.assert_close(record.pred_x0[-1], record.latents[-1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(record.pred_x0[0], record.latents[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-cfg", "wan", "wan22"])
def test_the_last_prediction_of_flow_matching_is_where_the_run_ends(name):
    case = tiny.CASES[name]
    record = DiffusionModel(case.build()).record(**case.arguments, seed=0)
    torch.testing.assert_close(record.pred_x0[-1], record.latents[-1].float(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(record.pred_x0[0], record.latents[-1].float(), rtol=1e-4, atol=1e-4)


def test_a_predicted_variance_is_left_off():
    case = tiny.CASES["pixart"]
    record = DiffusionModel(case.build()).record(**case.arguments, seed=0)
    assert record.pred_x0.shape == record.latents.shape


def test_sigma_falls_to_zero_with_the_noise():
    for scheduler in ("DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"):
        pipeline = tiny.sd1(getattr(diffusers, scheduler))
        record = DiffusionModel(pipeline).record("a red circle", num_inference_steps=6, seed=0)
        sigmas = [record.ledger.at(step)[0].sigma for step in range(6)]
        assert sigmas == sorted(sigmas, reverse=True)
        assert 5 < sigmas[0] < 20
        assert sigmas[-1] < 1


def test_sigma_is_the_schedulers_own_or_that_of_its_alphas():
    euler = diffusers.EulerDiscreteScheduler(**tiny.BETAS)
    euler.set_timesteps(5)
    assert prediction.sigma(euler, float(euler.timesteps[2])) == float(euler.sigmas[2])
    ddim = diffusers.DDIMScheduler(**tiny.BETAS)
    ddim.set_timesteps(5)
    alpha = float(ddim.alphas_cumprod[400])
    assert prediction.sigma(ddim, 400.0) == pytest.approx(((1 - alpha) / alpha) ** 0.5)


def test_a_convention_that_is_not_known_gives_no_prediction():
    ddim = diffusers.DDIMScheduler(**tiny.BETAS, prediction_type="epsilon")
    ddim.set_timesteps(5)
    sample = torch.zeros(1, 4, 8, 8)
    assert prediction.clean(ddim, sample, sample, 400.0) is not None
    ddim.register_to_config(prediction_type="something else")
    assert prediction.clean(ddim, sample, sample, 400.0) is None
    ddim.register_to_config(prediction_type="epsilon")
    assert prediction.clean(ddim, torch.zeros(1, 3, 8, 8), sample, 400.0) is None
