"""Places that are no module's output: methods and values of the run; modules skipped, and runs stopped."""

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.errors import InputError, OutOfOrderError, ShapeError, TraceError, UnknownNameError
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

RUN = {**tiny.WORDED, "num_inference_steps": 3, "seed": 0}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def plain(model):
    return model.record(
        **RUN, capture=["vae.decode", "scheduler.step", "latents", "noise_pred", "vae.decode:input"]
    )


def test_methods_are_captured_like_modules(model, plain):
    decoded = plain["vae.decode"]
    assert decoded.shape[1:] == (1, 3, 16, 16)
    with torch.no_grad():
        again = model.pipeline.vae.decode(plain["vae.decode:input"][0]).sample
    assert torch.equal(decoded[0], again)


def test_what_an_image_is_encoded_to_is_captured_read_and_replaced_by_its_parameters():
    case = tiny.FAMILIES["sd1-img2img"]
    model = DiffusionModel(case.build())
    asked = {**case.arguments, "seed": 0}
    record = model.record(**asked, capture=["vae.encode", "vae.encode:input"])
    vae = model.pipeline.vae
    with torch.no_grad():
        theirs = vae.encode(record["vae.encode:input"][0]).latent_dist
    assert record["vae.encode"].shape == (1, 1, 8, 8, 8)
    torch.testing.assert_close(record["vae.encode"][0], theirs.parameters)
    with model.generate(**asked) as run:
        seen = model.vae.encode.output.save()
    torch.testing.assert_close(seen.latent_dist.mean, theirs.mean)
    assert as_bytes(run.images) == as_bytes(record.images)
    with model.generate(**asked) as run:
        model.vae.encode.output = torch.zeros_like(theirs.parameters)
    assert as_bytes(run.images) != as_bytes(record.images)
    with model.generate(**asked) as run:
        model.vae.encode.output = model.vae.encode.output
    assert as_bytes(run.images) == as_bytes(record.images)
    with pytest.raises(ShapeError, match=r"\(1, 8, 8, 8\)"), model.generate(**asked):
        model.vae.encode.output = theirs.mean


def test_a_tensor_stands_for_the_tuple_that_holds_just_one(model, plain):
    with model.generate(**RUN) as run:
        for _ in run.steps:
            (prediction,) = model.unet.output
            assert prediction.shape == (2, 4, 8, 8)
            model.unet.output = prediction
    assert as_bytes(run.latents) == as_bytes(plain.latents)


def test_the_runs_values_are_those_of_the_record(plain):
    assert as_bytes(plain["latents"]) == as_bytes(plain.latents)
    assert as_bytes(plain["noise_pred"]) == as_bytes(plain.noise_pred)
    assert as_bytes(plain.at("latents", step=-1)) == as_bytes(plain.latents[-1])


def test_in_a_block_they_are_read_as_they_pass(model, plain):
    with model.generate(**RUN) as run:
        for step in run.steps:
            assert run.sigma == step.sigma
            assert as_bytes(run.noise_pred.save()) == as_bytes(plain.noise_pred[step.step])
            assert as_bytes(run.pred_x0) == as_bytes(plain.pred_x0[step.step])
            assert as_bytes(run.latents.save()) == as_bytes(plain.latents[step.step])
        assert as_bytes(model.vae.decode.output[0].save()) == as_bytes(plain["vae.decode"][0])
    assert as_bytes(run.latents) == as_bytes(plain.latents)
    assert as_bytes(run.images) == as_bytes(plain.images)


@pytest.mark.parametrize("name", ["latents", "noise_pred"])
def test_replacing_one_is_seen_by_what_follows_and_by_the_record(model, plain, name):
    with model.generate(**RUN) as run:
        for _ in run.steps[1:2]:
            setattr(run, name, getattr(run, name) * 0.5)
    changed, unchanged = getattr(run, name), getattr(plain, name)
    assert as_bytes(changed[0]) == as_bytes(unchanged[0])
    assert as_bytes(changed[1]) == as_bytes(unchanged[1] * 0.5)
    assert as_bytes(run.latents[2]) != as_bytes(plain.latents[2])


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_patching_the_latents_with_themselves_changes_no_byte(scheduler):
    import diffusers

    other = DiffusionModel(tiny.sd1(getattr(diffusers, scheduler)))
    source = other.record(**RUN, capture=["latents", "noise_pred"])
    for site in ("latents", "noise_pred"):
        patched = other.record(**RUN, interventions=[Patch(site, source=source)])
        assert as_bytes(patched.latents) == as_bytes(source.latents)


def test_a_patch_of_the_latents_from_a_step_on_is_the_other_run(model, plain):
    source = model.record(**{**RUN, "prompt": "a blue square"}, capture=["latents"])
    patched = model.record(**RUN, interventions=[Patch("latents", 2, source=source)])
    assert as_bytes(patched.latents[1]) == as_bytes(plain.latents[1])
    assert as_bytes(patched.latents[2]) == as_bytes(source.latents[2])
    assert as_bytes(patched.images) == as_bytes(source.images)


def test_the_schedulers_values_have_no_branch(model, plain):
    with pytest.raises(InputError, match="branch='cond'"):
        model.record(**RUN, interventions=[Patch("latents", source=plain, branch="cond")])


def test_a_fork_keeps_what_passed_before_it(model, plain):
    fork = plain.fork(2)
    assert as_bytes(fork["latents"]) == as_bytes(plain["latents"])
    assert as_bytes(fork.images) == as_bytes(plain.images)


def test_a_skipped_module_returns_what_it_is_given_and_does_not_run(model):
    ran = []
    hook = model.pipeline.unet.mid_block.resnets[0].register_forward_hook(lambda *_: ran.append(1))
    record = model.record(**RUN, capture=["unet.mid_block"])
    assert len(ran) == 3
    with model.generate(**RUN) as run:
        for step in run.steps[:2]:
            model.unet.mid_block.skip(record.at("unet.mid_block", step=step.step))
    assert len(ran) == 4
    assert as_bytes(run.latents) == as_bytes(record.latents)
    hook.remove()


def test_the_denoiser_itself_can_be_skipped(model):
    with model.generate(**RUN) as run:
        for _ in run.steps[:1]:
            model.unet.skip((torch.zeros(2, 4, 8, 8),))
    assert not run.noise_pred[0].any()
    assert run.noise_pred[1].any()


def test_a_module_that_runs_already_is_not_skipped(model):
    with model.generate(**RUN) as run:
        for _ in run.steps[:1]:
            assert model.unet.mid_block.resnets[0].output.ndim == 4
            with pytest.raises(OutOfOrderError, match=r"unet\.mid_block.*step 0"):
                model.unet.mid_block.skip(torch.zeros(1))


def test_a_stopped_run_keeps_what_was_seen(model, plain):
    before = footprint(model.pipeline)
    with model.generate(**RUN) as run:
        for step in run.steps:
            kept = run.latents.save()
            if step.step == 1:
                run.stop()
        with pytest.raises(TraceError, match=r"ended by run\.stop\(\)"):
            model.unet.conv_in.output.sum()
    assert run.stopped
    assert as_bytes(kept) == as_bytes(plain.latents[1])
    assert run.record.output is None
    assert len(run.record.latents) == 1
    assert footprint(model.pipeline) == before
    assert as_bytes(model.record(**RUN).images) == as_bytes(plain.images)


def test_a_stopped_run_forks_up_to_the_step_it_was_stopped_in(model, plain):
    with model.generate(**RUN) as run:
        for _ in run.steps[2]:
            run.stop()
    for step in (0, 2, -1):
        assert as_bytes(run.record.fork(step).latents) == as_bytes(plain.latents)
    with pytest.raises(
        InputError, match=r"ended within step 2.*fork at that step or an earlier one, not at 3"
    ):
        run.record.fork(3)


def test_a_run_whose_end_is_not_known_stops_too():
    case = tiny.FAMILIES["stable-cascade"]
    with DiffusionModel(case.build()).generate(**case.arguments, seed=0) as run:
        for step in run.steps:
            if step.step == 1:
                run.stop()
    assert run.stopped
    assert len(run.ledger) < len(DiffusionModel(case.build()).record(**case.arguments, seed=0).ledger)


def test_a_name_that_is_no_method_names_the_nearest(model):
    with pytest.raises(UnknownNameError, match=r"no module or method 'latent'.*'latents'"):
        model.record(**RUN, capture=["latent"])
    with pytest.raises(UnknownNameError, match="scheduler"):
        model.record(**RUN, capture=["scheduler"])
