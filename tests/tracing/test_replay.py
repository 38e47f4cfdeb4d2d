"""Forks: exact before their step, on their own way from it on."""

import diffusers
import pytest
import torch

import workbench
from tests import tiny
from tests.watching import as_bytes, forwards_of
from workbench.errors import InputError, ShapeError, UnknownNameError
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

PROMPT = "a red circle"
SITE = "unet.mid_block"


def sd1(scheduler="DDIMScheduler", **config):
    return DiffusionModel(tiny.sd1(getattr(diffusers, scheduler), **config))


def record(model, prompt=PROMPT, **arguments):
    return model.record(prompt, **{"num_inference_steps": 5, "seed": 0, "capture": [SITE], **arguments})


@pytest.mark.parametrize("scheduler", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_a_fork_without_a_seed_draws_the_same_noise_again(scheduler):
    whole = record(sd1(scheduler), seed=None)
    torch.rand(3)
    state = torch.get_rng_state()
    fork = whole.fork(2)
    assert as_bytes(fork.latents) == as_bytes(whole.latents)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("several", [False, True])
def test_a_fork_draws_from_the_generator_as_it_was_given(several, tmp_path):
    model = sd1("EulerAncestralDiscreteScheduler")
    given = torch.Generator().manual_seed(3)
    torch.rand(1, generator=given)
    asked = (
        {"prompt": [PROMPT, "a blue square"], "generator": [given] * 2} if several else {"generator": given}
    )
    whole = record(model, seed=None, num_inference_steps=4, **asked)
    after = given.get_state()
    plain = torch.Generator().manual_seed(3)
    torch.rand(1, generator=plain)
    plainly = {**asked, "generator": [plain] * 2 if several else plain}
    model.pipeline(**{"prompt": PROMPT, **plainly}, num_inference_steps=4, output_type="latent")
    assert torch.equal(after, plain.get_state())  # the run has advanced it as without us
    saved = workbench.load_record(whole.save(tmp_path / "record"), model=model)
    for step in (0, 1, 3, 1):
        for each in (whole, saved):
            assert as_bytes(each.fork(step).latents) == as_bytes(whole.latents)
    assert as_bytes(whole.fork(2).fork(1).latents) == as_bytes(whole.latents)
    assert torch.equal(after, given.get_state())


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler"])
def test_before_its_step_a_fork_computes_nothing(scheduler):
    model = sd1(scheduler)
    whole = record(model)
    for step in (0, 2, 5):
        with forwards_of(model.unet.module) as forwards:
            whole.fork(step)
        assert len(forwards) == sum(row.step >= step for row in whole.ledger)


def test_a_fork_at_the_end_computes_only_the_image():
    model = sd1()
    whole = record(model)
    with forwards_of(model.unet.module) as forwards, forwards_of(model.vae.decoder.module) as decoded:
        fork = whole.fork(5)
    assert forwards == []
    assert decoded == [1]
    assert fork.images[0].tobytes() == whole.images[0].tobytes()


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "flux-cfg", "pixart", "wan", "wan22"])
@pytest.mark.parametrize(
    "change", [{"prompt": "a blue square"}, {"guidance_scale": 1.0}, {"guidance_scale": 9.0}]
)
def test_a_fork_with_other_words_or_guidance_is_exact_up_to_its_step(name, change):
    case = tiny.CASES[name]
    model = DiffusionModel(case.build())
    whole = model.record(**case.arguments, seed=0)
    fork = whole.fork(2, **change)
    assert as_bytes(fork.latents[:2]) == as_bytes(whole.latents[:2])
    assert as_bytes(fork.noise_pred[:2]) == as_bytes(whole.noise_pred[:2])
    if name.startswith("flux") and "guidance_scale" in change:
        return  # a Flux without guidance embedding does not read guidance_scale
    assert as_bytes(fork.latents[2]) != as_bytes(whole.latents[2])


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_flux_guidance_is_switched_on_or_off_at_the_fork(scale):
    case = tiny.CASES["flux-cfg"]
    model = DiffusionModel(case.build())
    whole = model.record(**{**case.arguments, "true_cfg_scale": 6.0 - scale}, seed=0)
    fork = whole.fork(2, true_cfg_scale=scale)
    assert as_bytes(fork.latents[:2]) == as_bytes(whole.latents[:2])
    assert as_bytes(fork.latents[2]) != as_bytes(whole.latents[2])


def test_from_its_step_on_a_fork_is_what_a_run_from_those_latents_would_be():
    """Known end: a fork at step 0 to another prompt is that prompt's whole run."""
    model = sd1()
    other = record(model, "a blue square")
    fork = record(model).fork(0, prompt="a blue square")
    assert as_bytes(fork.latents) == as_bytes(other.latents)
    assert fork.images[0].tobytes() == other.images[0].tobytes()


def test_a_fork_of_a_fork_is_exact_too():
    model = sd1("EulerAncestralDiscreteScheduler")
    first = record(model).fork(2, prompt="a blue square")
    second = first.fork(4)
    assert as_bytes(second.latents) == as_bytes(first.latents)
    third = first.fork(3, prompt="a green cross")
    assert as_bytes(third.latents[:3]) == as_bytes(first.latents[:3])
    assert as_bytes(third.latents[3]) != as_bytes(first.latents[3])


def test_an_intervention_of_the_run_stays_in_its_fork_unless_replaced():
    model = sd1()
    source = record(model, "a blue square")
    patched = record(model, interventions=[Patch(SITE, source=source)])
    assert as_bytes(patched.fork(2).latents) == as_bytes(patched.latents)
    cleared = patched.fork(2, interventions=[])
    assert as_bytes(cleared.latents[:2]) == as_bytes(patched.latents[:2])
    assert as_bytes(cleared.latents[2]) != as_bytes(patched.latents[2])


def test_a_patch_from_the_fork_on_is_that_patch_in_the_whole_run():
    model = sd1()
    source, target = record(model, "a blue square"), record(model)
    patch = Patch(SITE, source=source, steps=range(2, 5), branch="cond")
    assert as_bytes(target.fork(2, interventions=[patch]).latents) == as_bytes(
        record(model, interventions=[patch]).latents
    )


def test_a_fork_captures_what_it_is_asked_for():
    whole = record(sd1())
    fork = whole.fork(2, capture=["unet.conv_in"])
    assert len(fork["unet.conv_in"]) == 3
    with pytest.raises(UnknownNameError, match="was not captured"):
        fork[SITE].clone()
    assert len(whole.fork(2)[SITE]) == 5


def test_a_fork_of_a_block_is_exact():
    model = sd1()
    with model.generate(PROMPT, num_inference_steps=5, seed=0) as run:
        for _ in run.steps[:2]:
            model.unet.mid_block.output.mul_(0.5)
    fork = run.fork(2)
    assert as_bytes(fork.latents) == as_bytes(run.latents)
    assert as_bytes(record(model).latents) != as_bytes(run.latents)


def test_the_same_fork_twice_is_the_same():
    whole = record(sd1("KDPM2AncestralDiscreteScheduler"))
    one, two = (whole.fork(2, prompt="a blue square") for _ in range(2))
    assert as_bytes(one.latents) == as_bytes(two.latents)


def test_several_samples_fork_together():
    whole = record(sd1(), ["a red circle", "a blue square"], num_images_per_prompt=2)
    fork = whole.fork(3)
    assert as_bytes(fork.latents) == as_bytes(whole.latents)
    assert len(fork.images) == 4


@pytest.mark.parametrize(
    "change", [{"prompt": ["a red circle", "a blue square"]}, {"num_images_per_prompt": 2}]
)
def test_a_fork_to_another_number_of_samples_is_refused(change):
    with pytest.raises((InputError, ShapeError), match="number of samples"):
        record(sd1()).fork(2, **change)


def test_a_fork_to_another_size_is_refused():
    with pytest.raises((InputError, ShapeError), match="keeps the size"):
        record(sd1()).fork(2, height=32, width=32)


def test_a_fork_to_another_number_of_steps_is_refused():
    with pytest.raises(InputError, match="num_inference_steps"):
        record(sd1()).fork(2, num_inference_steps=9)


@pytest.mark.parametrize("step", [6, -6, 100])
def test_a_fork_at_a_step_the_run_does_not_have_is_refused(step):
    with pytest.raises(InputError, match=f"has 5 steps; it cannot fork at step {step}"):
        record(sd1()).fork(step)


def test_a_fork_keeps_its_seed():
    with pytest.raises(InputError, match="keeps the noise"):
        record(sd1()).fork(2, seed=1)


def test_a_misspelt_change_names_the_nearest():
    with pytest.raises(UnknownNameError, match="guidance_scale"):
        record(sd1()).fork(2, guidence_scale=3.0)
