"""Runs of several stages: whose step a tick is, and what is said where the end is not known yet."""

import diffusers
import pytest

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, OutOfOrderError
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.tracing.rig import Rig
from workbench.tracing.stages import Stages
from workbench.tracing.system import System

CASCADE = tiny.FAMILIES["stable-cascade"]
SITE = CASCADE.site


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(CASCADE.build())


@pytest.fixture(scope="module")
def whole(model):
    return model.record(**CASCADE.arguments, seed=0, capture=[SITE])


def test_steps_go_on_from_one_stage_to_the_next(whole):
    found = [(row.component, row.step) for row in whole.ledger]
    assert found == [
        ("prior_prior", 0),
        ("prior_prior", 1),
        ("prior_prior", 2),
        ("decoder", 3),
        ("decoder", 4),
    ]


def test_latents_of_stages_are_read_one_by_one(whole):
    assert whole.step_latents(2).shape != whole.step_latents(3).shape
    assert as_bytes(whole.step_latents(-1)) == as_bytes(whole.ticks[4]["latents"])
    with pytest.raises(InputError, match=r"differ in shape.*ticks\[0\]\['latents'\]"):
        whole.latents.clone()


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        (slice(None), [0, 1, 2, 3, 4]),
        (slice(2, 4), [2, 3]),
        (slice(3, 99), [3, 4]),
        (slice(1, None, 2), [1, 3]),
        ([0, 4], [0, 4]),
        (3, [3]),
    ],
)
def test_a_block_goes_through_the_steps_of_all_stages(model, whole, chosen, steps):
    with model.generate(**CASCADE.arguments, seed=0) as run:
        assert [row.step for row in run.steps[chosen]] == steps
    assert as_bytes(dict(run.output)) == as_bytes(dict(whole.output))


def test_a_block_may_choose_steps_twice(model):
    with model.generate(**CASCADE.arguments, seed=0) as run:
        assert [row.step for row in run.steps[:2]] == [0, 1]
        assert [row.step for row in run.steps[2:]] == [2, 3, 4]


@pytest.mark.parametrize("chosen", [-1, slice(-2, None), slice(None, None, -1), [0, -1]])
def test_steps_from_an_end_that_is_not_known_are_refused(model, chosen):
    with (
        model.generate(**CASCADE.arguments, seed=0) as run,
        pytest.raises(InputError, match="its last stage"),
    ):
        list(run.steps[chosen])


def test_a_step_after_the_end_is_refused(model):
    with model.generate(**CASCADE.arguments, seed=0) as run, pytest.raises(OutOfOrderError, match="5 steps"):
        list(run.steps[[0, 7]])


@pytest.mark.parametrize("steps", [-1, slice(-2, None)])
def test_a_patch_from_an_end_that_is_not_known_is_refused(model, whole, steps):
    prior = "prior_prior.down_blocks.0.0"
    source = model.record(**CASCADE.arguments, seed=0, capture=[prior])
    with pytest.raises(InputError, match="does not know before its last stage"):
        model.record(**CASCADE.arguments, seed=0, interventions=[Patch(prior, steps, source=source)])


def test_in_the_last_stage_steps_are_counted_from_the_end(model, whole):
    halved = []
    with model.generate(**CASCADE.arguments, seed=0) as run:
        list(run.steps[:4])
        for row in run.steps[-1]:
            model.site(SITE).output.mul_(0.5)
            halved.append(row.step)
    assert halved == [4]
    assert as_bytes(run.step_latents(3)) == as_bytes(whole.step_latents(3))
    assert as_bytes(run.step_latents(4)) != as_bytes(whole.step_latents(4))


def test_run_values_are_those_of_the_stage_the_run_is_in(model, whole):
    with model.generate(**CASCADE.arguments, seed=0) as run:
        first = run.latents.clone()
        read = [(run.noise_pred.clone(), run.latents.clone()) for _ in run.steps[1:]]
    assert as_bytes(first) == as_bytes(whole.ticks[0]["latents"])
    kept = [(tick["noise_pred"], tick["latents"]) for tick in whole.ticks[1:]]
    assert as_bytes(read) == as_bytes(kept)


def test_run_values_are_kept_and_replaced_in_every_stage(model, whole):
    asked = ["latents", "prior_scheduler.step:output[0]"]
    record = model.record(**CASCADE.arguments, seed=0, capture=asked)
    ticks = [tick["latents"] for tick in whole.ticks]
    assert as_bytes([each.value for each in record.passages("latents")]) == as_bytes(ticks)
    assert as_bytes([each.value for each in record.passages(asked[1])]) == as_bytes(ticks[:3])
    with model.generate(**CASCADE.arguments, seed=0) as run:
        for row in run.steps[1:]:
            if row.step == 1:
                run.latents = run.latents * 0.5
    assert as_bytes(run.step_latents(0)) == as_bytes(whole.step_latents(0))
    assert as_bytes(run.step_latents(1)) == as_bytes(whole.step_latents(1) * 0.5)


def test_a_derivative_may_be_taken_of_the_latents_of_the_first_stage(model):
    site = "prior_prior.down_blocks.0.0"
    asked = {"of": lambda latents: latents.mean(), "wrt": site, "steps": 1, "result": "latents"}
    found = model.gradient(**CASCADE.arguments, seed=0, **asked, result_step=1)
    assert found[site].abs().sum() > 0


# Where a stage begins and ends


def told(kind, steps, **config):
    """Stages of one scheduler that has been told its steps."""
    scheduler = kind(**config)
    stages, rig = Stages(System({"scheduler": scheduler}, print)), Rig()
    stages.attach(rig, lambda: 0)
    scheduler.set_timesteps(steps)
    rig.sweep()
    return scheduler, stages


def test_the_whole_list_is_the_run():
    scheduler, stages = told(diffusers.DDIMScheduler, 10)
    stages.called(0, float(scheduler.timesteps[0]))
    assert stages.total == 10


def test_a_stage_may_begin_in_the_middle_of_the_list():
    scheduler, stages = told(diffusers.DDIMScheduler, 10)
    stages.called(0, float(scheduler.timesteps[4]))
    assert stages.total == 6


@pytest.mark.parametrize(("begin", "steps"), [(0, 10), (1, 9), (2, 8), (3, 7)])
def test_a_timestep_that_comes_twice_is_told_apart_by_the_next_call(begin, steps):
    scheduler, stages = told(diffusers.PNDMScheduler, 10, skip_prk_steps=True)
    timesteps = [float(each) for each in scheduler.timesteps]
    assert timesteps[1] == timesteps[2]
    for tick, timestep in enumerate(timesteps[begin:]):
        stages.called(tick, timestep)
    assert stages.total == steps


def test_a_beginning_the_scheduler_was_told_counts():
    scheduler, stages = told(diffusers.HeunDiscreteScheduler, 10)
    scheduler.set_begin_index(8)
    stages.called(0, float(scheduler.timesteps[8]))
    assert stages.total == 6


def test_a_list_from_one_to_zero_names_the_end_too():
    scheduler, stages = told(diffusers.DDPMWuerstchenScheduler, 10)
    assert len(scheduler.timesteps) == 11
    assert stages.total == 10


def test_before_a_scheduler_is_told_nothing_is_known():
    assert Stages(System({"scheduler": diffusers.DDIMScheduler()}, print)).total is None
    assert Stages(System({}, print)).total is None
    assert Stages(System({}, print)).step_of(3) == 3


def test_a_scheduler_that_is_told_again_begins_a_stage():
    scheduler = diffusers.DDIMScheduler()
    done, rig = [0], Rig()
    stages = Stages(System({"scheduler": scheduler}, print))
    stages.attach(rig, lambda: done[0])
    scheduler.set_timesteps(4)
    assert (stages.step_of(3), stages.total) == (3, 4)
    done[0] = 4
    scheduler.set_timesteps(3)
    assert (stages.step_of(4), stages.step_of(6), stages.total) == (4, 6, 7)
    rig.sweep()
