"""Going through a run's steps, calls and ticks: always on, never back, and what a loop left behind."""

import numpy as np
import pytest
import torch
from diffusers import HeunDiscreteScheduler

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, OutOfOrderError
from workbench.models.model import DiffusionModel

RUN = {**tiny.WORDED, "seed": 0}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def whole(model):
    return model.record(**RUN, capture=["unet.mid_block", "vae.decode:input"])


def read_step(model, run):
    for _ in run.steps[3]:
        model.unet.mid_block.output.clone()


def pass_step(model, run):
    list(run.steps[[2]])


def break_off_calls(model, run):
    for row in run.calls:
        if row.call == 2:
            break


def take_two(model, run):
    list(run.steps[:2])


def clear(model, steps):
    for _ in steps:
        model.unet.mid_block.output = 0 * model.unet.mid_block.output


@pytest.mark.parametrize(
    ("before", "chosen", "said"),
    [
        (
            read_step,
            1,
            r"Step 1 has passed: the run is at unet\.mid_block, step 3, call 3\. Steps only go on",
        ),
        (read_step, 3, r"Step 3 has begun: the run is at unet\.mid_block, step 3"),
        (pass_step, 0, r"Step 0 has passed: the run is at the start of the denoiser, step 2"),
        (break_off_calls, 1, r"Step 1 has passed: the run is at the start of the denoiser, step 2"),
        (take_two, slice(None), r"Step 0 has passed: the run is at the start of the denoiser, step 1"),
    ],
)
def test_a_loop_that_goes_back_is_refused_and_changes_nothing(model, whole, before, chosen, said):
    with model.generate(**RUN) as run:
        before(model, run)
        with pytest.raises(OutOfOrderError, match=said):
            clear(model, run.steps[chosen])
    assert as_bytes(run.latents) == as_bytes(whole.latents)


def test_a_step_whose_start_the_run_waits_at_is_there_for_another_loop(model, whole):
    with model.generate(**RUN) as run:
        assert [row.step for row in run.steps[2]] == [2]
        for row in run.steps[2:3]:
            assert row.step == 2
            assert torch.equal(model.unet.mid_block.output, whole["unet.mid_block"][2])


def test_after_the_end_there_is_no_step_to_go_to():
    case = tiny.CASES["wan22"]
    model = DiffusionModel(case.build())
    with model.generate(**case.arguments, seed=0) as run:
        assert len(list(run.steps)) == 4
        assert len(list(run.calls)) > 0
        with pytest.raises(OutOfOrderError, match="the run is at its end"):
            list(run.steps)


@pytest.mark.parametrize("kind", ["flux-cfg", "sd1", "stable-cascade"])
def test_each_step_has_all_its_calls(kind):
    case = tiny.FAMILIES[kind]
    model = DiffusionModel(case.build())
    met = []
    with model.generate(**case.arguments, seed=0) as run:
        for step in run.steps:
            for call in run.calls:
                if call.step != step.step:
                    break
                met.append((step.step, call.call))
    assert met == [(row.step, row.call) for row in run.ledger]


def test_each_step_has_all_its_ticks():
    model = DiffusionModel(tiny.sd1(HeunDiscreteScheduler))
    met = []
    with model.generate(**RUN) as run:
        for step in run.steps:
            for tick in run.ticks:
                if tick.step != step.step:
                    break
                met.append((step.step, tick.tick, run.latents.save()))
    assert [(step, tick) for step, tick, _ in met] == [(row.step, row.tick) for row in run.ledger]
    assert as_bytes([latents for *_, latents in met]) == as_bytes(list(run.latents))


def test_reads_after_a_loop_that_was_left_are_bound_to_no_step(model, whole):
    with model.generate(**RUN) as run:
        for step in run.steps:
            if step.step == 1:
                break
        assert torch.equal(model.vae.decode.input, whole["vae.decode:input"][0])


def test_reads_after_a_loop_that_was_left_are_bound_to_no_step_of_a_cascade():
    case = tiny.FAMILIES["stable-cascade"]
    model = DiffusionModel(case.build())
    with model.generate(**case.arguments, seed=0) as run:
        for _ in run.steps[1:]:
            break
        assert model.vqgan.decode.input.ndim == 4


def test_a_loop_that_is_collected_late_leaves_the_next_one_alone(model):
    with model.generate(**RUN) as run:
        early = run.steps[0]
        next(early)
        for _ in run.steps[1:2]:
            early.close()
            model.unet.mid_block.output.clone()
            with pytest.raises(OutOfOrderError, match="did not pass again in step 1"):
                model.vae.decode.output.clone()


@pytest.mark.parametrize("chosen", [np.int64(2), np.array([2]), torch.tensor(2), [np.int64(2)], range(2, 3)])
def test_steps_are_numbers_of_any_library(model, chosen):
    with model.generate(**RUN) as run:
        assert [row.step for row in run.steps[chosen]] == [2]


@pytest.mark.parametrize("chosen", ["2", 1.5, [0.5], None])
def test_what_is_no_step_is_refused(model, chosen):
    with model.generate(**RUN) as run, pytest.raises(InputError, match="does not name steps"):
        list(run.steps[chosen])
