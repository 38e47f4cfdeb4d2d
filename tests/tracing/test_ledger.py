"""The rows and branches of the ledger; `test_matrix.py` and `test_schedulers.py` have the clocks."""

import diffusers
import pytest
import torch

from tests import tiny
from tests.watching import clocks_of
from workbench.errors import InputError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.tracing.ledger import Ledger, Row


def sd1(scheduler="DDIMScheduler", **config):
    return tiny.sd1(getattr(diffusers, scheduler), skip_prk_steps=True, **config)


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_block_goes_through_the_same_steps(scheduler):
    pipeline, met = sd1(scheduler), []
    model = DiffusionModel(pipeline)
    asked = {"num_inference_steps": 10, "seed": 0}
    with clocks_of(pipeline) as clocks, model.generate("a red circle", **asked) as run:
        for row in run.steps:
            model.unet.output[0].clone()
            met.append((row.step, clocks.steps))
    assert met == [(step, step) for step in range(10)]


def test_control_the_clocks_differ_where_calls_are_not_steps():
    pipeline = sd1("HeunDiscreteScheduler")
    with clocks_of(pipeline) as clocks:
        pipeline("a red circle", num_inference_steps=10)
    assert (len(clocks.calls), clocks.ticks, clocks.steps) == (19, 19, 10)
    assert any(tick != step for _, tick, step in clocks.calls)


# Branches


def test_without_guidance_there_is_only_the_conditional_branch():
    ledger = DiffusionModel(sd1()).record("a red circle", num_inference_steps=2, guidance_scale=1.0).ledger
    assert ledger.branches == ("cond",)


@pytest.mark.parametrize(
    ("prompt", "images"), [(["a red circle", "a blue square"], 1), ("a red circle", 2), (["a", "b"], 2)]
)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_several_prompts_and_images_are_not_taken_for_branches(prompt, images, guidance):
    record = DiffusionModel(sd1()).record(
        prompt,
        num_inference_steps=2,
        num_images_per_prompt=images,
        guidance_scale=guidance,
        seed=0,
        capture=["unet.conv_in"],
    )
    samples = (len(prompt) if isinstance(prompt, list) else 1) * images
    assert record.ledger.branches == (("uncond", "cond") if guidance > 1 else ("cond",))
    assert record.at("unet.conv_in", step=0, branch="cond").shape[0] == samples
    assert record.latents.shape[1] == samples


def test_the_conditional_rows_are_those_the_prompt_changes():
    model = DiffusionModel(sd1())
    site = "unet.mid_block.attentions.0"
    one, other = (
        model.record(prompt, num_inference_steps=1, seed=0, capture=[site])
        for prompt in ("a red circle", "a blue square")
    )
    assert torch.equal(one.at(site, step=0, branch="uncond"), other.at(site, step=0, branch="uncond"))
    assert not torch.equal(one.at(site, step=0, branch="cond"), other.at(site, step=0, branch="cond"))


def test_dits_conditional_rows_are_those_the_class_changes():
    model = DiffusionModel(tiny.dit())
    site = "transformer.transformer_blocks.1"
    one, other = (
        model.record(class_labels=[label], num_inference_steps=1, seed=0, capture=[site]) for label in (3, 7)
    )
    assert torch.equal(one.at(site, step=0, branch="uncond"), other.at(site, step=0, branch="uncond"))
    assert not torch.equal(one.at(site, step=0, branch="cond"), other.at(site, step=0, branch="cond"))


# The ledger itself


def ledger_of(*branches, steps=3):
    rows = [(step, each) for step in range(steps) for each in branches]
    return Ledger(
        Row(call=call, tick=step, step=step, timestep=0.0, sigma=None, branches=each, component="unet")
        for call, (step, each) in enumerate(rows)
    )


def test_rows_are_found_by_step_and_branch():
    ledger = ledger_of(("cond",), ("uncond",))
    assert [row.call for row in ledger.at(1)] == [2, 3]
    assert [row.call for row in ledger.at(1, "uncond")] == [3]
    assert ledger.at(-1, "cond") == ledger.at(2, "cond")
    assert ledger.last_tick(-1) == 2


@pytest.mark.parametrize("step", [3, -4, 100])
def test_a_step_the_run_does_not_have_is_refused(step):
    with pytest.raises(InputError, match=rf"has 3 steps \(0 to 2\); {step} is none"):
        ledger_of(("cond",)).at(step)


def test_a_branch_the_run_does_not_have_names_those_it_has():
    with pytest.raises(UnknownNameError, match=r"no branch 'con'.*'cond'"):
        ledger_of(("cond",)).at(0, "con")


def test_rows_of_a_branch_are_an_equal_stretch_of_the_batch():
    row = ledger_of(("uncond", "cond"))[0]
    assert (row.rows("uncond", 6), row.rows("cond", 6), row.rows("all", 6)) == (
        slice(0, 3),
        slice(3, 6),
        slice(0, 6),
    )
    with pytest.raises(InputError, match="5 rows does not divide"):
        row.rows("cond", 5)


def test_a_ledger_equals_another_with_the_same_rows():
    assert ledger_of(("cond",)) == ledger_of(("cond",))
    assert ledger_of(("cond",)) != ledger_of(("uncond",))


def test_a_ledger_reads_as_a_table():
    lines = repr(ledger_of(("uncond", "cond"), steps=2)).splitlines()
    assert lines[0].split() == ["call", "tick", "step", "timestep", "sigma", "branch"]
    assert lines[2].split() == ["1", "1", "1", "0.00", "uncond+cond", "(unet)"]
