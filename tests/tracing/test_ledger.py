"""The ledger, beside the pipeline's own clocks: denoiser forwards, scheduler steps, the real progress bar."""

import diffusers
import pytest
import torch

from tests import tiny
from workbench.errors import InputError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.tracing.ledger import Ledger, Row

CALLS = {
    "DDIMScheduler": 10,
    "DDPMScheduler": 10,
    "EulerDiscreteScheduler": 10,
    "EulerAncestralDiscreteScheduler": 10,
    "DPMSolverMultistepScheduler": 10,
    "DPMSolverSinglestepScheduler": 10,
    "UniPCMultistepScheduler": 10,
    "DEISMultistepScheduler": 10,
    "LMSDiscreteScheduler": 10,
    "LCMScheduler": 10,
    "PNDMScheduler": 11,
    "HeunDiscreteScheduler": 19,
    "KDPM2DiscreteScheduler": 19,
    "KDPM2AncestralDiscreteScheduler": 19,
}
"""Denoiser calls of ten requested steps."""


class Clocks:
    """Counts what the pipeline does by watching its bar, its denoisers' hooks and its scheduler."""

    def __init__(self, pipeline):
        self.calls = []
        self.steps = self.ticks = 0
        bar, step = pipeline.progress_bar, pipeline.scheduler.step

        def progress_bar(*args, **kwargs):
            made = bar(*args, **kwargs)
            made.update = self.advance
            return made

        def stepped(*args, **kwargs):
            self.ticks += 1
            self.timesteps = [*getattr(self, "timesteps", []), float(args[1])]
            return step(*args, **kwargs)

        pipeline.progress_bar, pipeline.scheduler.step = progress_bar, stepped
        for name in ("unet", "transformer", "transformer_2"):
            module = getattr(pipeline, name, None)
            if module is not None:
                module.register_forward_pre_hook(lambda *_, name=name: self.call(name))

    def advance(self, by=1):
        self.steps += by

    def call(self, name):
        self.calls.append((name, self.ticks, self.steps))


def seen(ledger):
    return [(row.component, row.tick, row.step) for row in ledger]


def sd1(scheduler="DDIMScheduler", **config):
    return tiny.sd1(getattr(diffusers, scheduler), skip_prk_steps=True, **config)


@pytest.mark.parametrize(("scheduler", "calls"), CALLS.items())
def test_calls_ticks_and_steps_are_those_of_the_pipelines_own_clocks(scheduler, calls):
    pipeline = sd1(scheduler)
    clocks = Clocks(pipeline)
    ledger = DiffusionModel(pipeline).record("a red circle", num_inference_steps=10, seed=0).ledger
    assert seen(ledger) == clocks.calls
    assert [row.call for row in ledger] == list(range(calls))
    assert (len(ledger), ledger.ticks, ledger.steps) == (calls, calls, 10)
    assert [row.timestep for row in ledger] == clocks.timesteps


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_block_goes_through_the_same_steps(scheduler):
    pipeline = sd1(scheduler)
    clocks, met = Clocks(pipeline), []
    model = DiffusionModel(pipeline)
    with model.generate("a red circle", num_inference_steps=10, seed=0) as run:
        for row in run.steps:
            model.unet.output[0].clone()
            met.append((row.step, clocks.steps))
    assert met == [(step, step) for step in range(10)]


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux", "flux-cfg", "pixart", "wan", "wan22"])
def test_every_family_is_counted_as_its_progress_bar_counts_it(name):
    case = tiny.CASES[name]
    pipeline = case.build()
    clocks = Clocks(pipeline)
    ledger = DiffusionModel(pipeline).record(**case.arguments, seed=0).ledger
    assert seen(ledger) == clocks.calls
    assert (ledger.ticks, ledger.steps) == (4, 4)
    assert [row.timestep for row in ledger if "cond" in row.branches] == clocks.timesteps


def test_a_warm_up_of_several_calls_belongs_to_its_steps():
    pipeline = tiny.sd1(diffusers.PNDMScheduler, skip_prk_steps=False)
    clocks = Clocks(pipeline)
    ledger = DiffusionModel(pipeline).record("a red circle", num_inference_steps=10, seed=0).ledger
    assert seen(ledger) == clocks.calls
    assert (len(ledger), ledger.steps) == (19, 10)


@pytest.mark.parametrize("name", ["ddpm", "dit"])
def test_pipelines_without_callbacks_are_counted_too(name):
    case = tiny.CASES[name]
    ledger = DiffusionModel(case.build()).record(**case.arguments, seed=0).ledger
    assert [(row.call, row.tick, row.step) for row in ledger] == [(step, step, step) for step in range(4)]


def test_control_the_clocks_differ_where_calls_are_not_steps():
    pipeline = sd1("HeunDiscreteScheduler")
    clocks = Clocks(pipeline)
    pipeline("a red circle", num_inference_steps=10)
    assert (len(clocks.calls), clocks.ticks, clocks.steps) == (19, 19, 10)
    assert any(tick != step for _, tick, step in clocks.calls)


# Branches


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("sd1", ["uncond+cond"]),
        ("sdxl", ["uncond+cond"]),
        ("sd3", ["uncond+cond"]),
        ("pixart", ["uncond+cond"]),
        ("flux", ["cond"]),
        ("flux-cfg", ["cond", "uncond"]),
        ("wan", ["cond", "uncond"]),
        ("wan22", ["cond", "uncond"]),
        ("ddpm", ["cond"]),
        ("dit", ["cond+uncond"]),
    ],
)
def test_branches_are_named_in_the_order_the_pipeline_computes_them(name, branches):
    case = tiny.CASES[name]
    ledger = DiffusionModel(case.build()).record(**case.arguments, seed=0).ledger
    assert [row.branch for row in ledger] == branches * 4


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
