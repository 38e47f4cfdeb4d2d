"""Every scheduler that Stable Diffusion runs with: its clocks, looking, and forks."""

from __future__ import annotations

import diffusers
import pytest
import torch

from tests import tiny
from tests.watching import as_bytes, clocks_of
from workbench.models.model import DiffusionModel
from workbench.tracing.rig import Owned

# torchsde remarks on rounding of the times it is asked for.
pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]:UserWarning")

STEPS = 10

CALLS = {
    "CMStochasticIterativeScheduler": 10,
    "CogVideoXDDIMScheduler": 10,
    "DDIMInverseScheduler": 10,
    "DDIMParallelScheduler": 10,
    "DDIMScheduler": 10,
    "DDPMParallelScheduler": 10,
    "DDPMScheduler": 10,
    "DEISMultistepScheduler": 10,
    "DPMSolverMultistepInverseScheduler": 10,
    "DPMSolverMultistepScheduler": 10,
    "DPMSolverSDEScheduler": 19,
    "DPMSolverSinglestepScheduler": 10,
    "EDMDPMSolverMultistepScheduler": 10,
    "EDMEulerScheduler": 10,
    "EulerAncestralDiscreteScheduler": 10,
    "EulerDiscreteScheduler": 10,
    "HeunDiscreteScheduler": 19,
    "IPNDMScheduler": 10,
    "KDPM2AncestralDiscreteScheduler": 19,
    "KDPM2DiscreteScheduler": 19,
    "LCMScheduler": 10,
    "LMSDiscreteScheduler": 10,
    "PNDMScheduler": 11,
    "SASolverScheduler": 10,
    "TCDScheduler": 10,
    "UniPCMultistepScheduler": 10,
}
"""Denoiser calls of ten requested steps, as the hooks of the test count them."""

CONFIGURED = {
    "PNDM with its warm-up": ("PNDMScheduler", {"skip_prk_steps": False}, 19),
    "SDE-DPM++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 10),
    "SDE-DPM++ in single steps": ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 10),
    "Karras sigmas": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, 10),
    "v": ("DDIMScheduler", {"prediction_type": "v_prediction"}, 10),
    "trailing": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, 10),
}

RUNS = {
    name: (name, {"skip_prk_steps": True} if name == "PNDMScheduler" else {}, calls)
    for name, calls in CALLS.items()
}
RUNS |= CONFIGURED

DISCRETE = "steps tokens, not latents"
FLOW = "for flow matching, scales no input"
OTHERS = {
    "AmusedScheduler": DISCRETE,
    "BlockRefinementScheduler": DISCRETE,
    "CogVideoXDPMScheduler": "is stepped with the earlier prediction too; CogVideoX runs it in the matrix",
    "CosineDPMSolverMultistepScheduler": "needs torchsde, preconditions for Stable Audio",
    "DDPMWuerstchenScheduler": "times from one to zero; Stable Cascade runs it in the matrix",
    "DiscreteDDIMScheduler": DISCRETE,
    "EntropyBoundScheduler": DISCRETE,
    "FlowMapEulerDiscreteScheduler": FLOW,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": FLOW,
    "FlowMatchLCMScheduler": FLOW,
    "HeliosDMDScheduler": FLOW,
    "HeliosScheduler": FLOW,
    "KarrasVeScheduler": "is stepped with two noise levels",
    "LTXEulerAncestralRFScheduler": FLOW,
    "MiniMaxH3Scheduler": FLOW,
    "PiflowScheduler": FLOW,
    "RFD4ProteinaScheduler": "for proteins",
    "RePaintScheduler": "is stepped with the picture and the mask",
    "SCMScheduler": FLOW,
    "ScoreSdeVeScheduler": "has two kinds of step",
    "UnCLIPScheduler": "scales no input; Kandinsky's prior runs it in the matrix",
    "VQDiffusionScheduler": DISCRETE,
}
"""Why Stable Diffusion does not run with the rest."""


@pytest.fixture(scope="module", params=list(RUNS))
def run(request):
    """A bare run and its recording; the pipeline's own clocks of both."""
    name, config, calls = RUNS[request.param]
    kind = getattr(diffusers, name)
    if "dummy" in kind.__module__:
        pytest.skip(f"{name} needs a package that is not installed")
    return Run(tiny.sd1(kind, **config), calls)


class Run:
    def __init__(self, pipeline, calls):
        self.calls = calls
        self.model = DiffusionModel(pipeline)
        asked = {"prompt": "a red circle", "num_inference_steps": STEPS, "output_type": "latent"}
        torch.manual_seed(11)
        with clocks_of(pipeline) as self.bare:
            pipeline(**asked, generator=torch.Generator("cpu").manual_seed(0))
        self.drawn = torch.get_rng_state()
        torch.manual_seed(11)
        with clocks_of(pipeline) as self.traced:
            self.record = self.model.record(**asked, seed=0, capture=["unet.mid_block"])
        self.drawn_traced = torch.get_rng_state()


def test_the_ledger_is_what_the_pipelines_own_clocks_count(run):
    ledger = run.record.ledger
    assert [(row.component, row.tick, row.step) for row in ledger] == run.bare.calls
    assert [row.timestep for row in ledger] == run.bare.timesteps
    assert (len(ledger), ledger.ticks, ledger.steps) == (run.calls, run.bare.ticks, run.bare.steps)
    assert run.bare.steps == STEPS


def test_looking_changes_neither_the_latents_nor_what_is_drawn(run):
    assert run.traced.latents == run.bare.latents
    assert torch.equal(run.drawn_traced, run.drawn)
    assert [as_bytes(each) for each in run.record.latents] == run.bare.latents


@pytest.mark.parametrize("step", [3, 9])
def test_a_fork_is_the_whole_run(run, step):
    with clocks_of(run.model.pipeline) as clocks:
        fork = run.record.fork(step)
    assert clocks.latents == run.bare.latents
    assert as_bytes(fork.output.images) == as_bytes(run.record.output.images)
    assert as_bytes(fork["unet.mid_block"]) == as_bytes(run.record["unet.mid_block"])
    assert fork.ledger == run.record.ledger


def test_steps_are_counted_from_the_end_too(run):
    with run.model.generate("a red circle", num_inference_steps=STEPS, seed=0, output_type="latent") as block:
        assert [row.step for row in block.steps[-2:]] == [STEPS - 2, STEPS - 1]


def test_every_scheduler_of_diffusers_is_run_or_has_its_reason():
    known = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    assert known == set(CALLS) | set(OTHERS)
    assert not set(CALLS) & set(OTHERS)


def test_control_a_step_without_its_signature_draws_other_noise(monkeypatch):
    """Pipelines pass the generator only to a ``step`` that says it takes one."""
    wrapped = Run(tiny.sd1(diffusers.EulerAncestralDiscreteScheduler), STEPS)
    assert wrapped.traced.latents == wrapped.bare.latents
    monkeypatch.setattr(Owned, "__wrapped__", property(None, lambda self, _: None), raising=False)
    bare = Run(tiny.sd1(diffusers.EulerAncestralDiscreteScheduler), STEPS)
    assert bare.traced.latents != bare.bare.latents


# Runs that begin in the middle of the scheduler's list

FROM_IMAGES = {
    "image to image": (tiny.sd1_from_image, {"image": tiny.picture(), "strength": 0.5}),
    "inpainting": (tiny.sd1_inpaint, {"image": tiny.picture(), "mask_image": tiny.mask(), "strength": 0.7}),
}


@pytest.mark.parametrize(
    "scheduler",
    ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"],
)
@pytest.mark.parametrize("name", FROM_IMAGES)
def test_a_run_from_an_image_is_counted_and_forks(name, scheduler):
    build, given = FROM_IMAGES[name]
    pipeline = build(getattr(diffusers, scheduler), skip_prk_steps=True)
    asked = {"prompt": "a red circle", "num_inference_steps": STEPS, "output_type": "latent", **given}
    with clocks_of(pipeline) as bare:
        pipeline(**asked, generator=torch.Generator("cpu").manual_seed(0))
    model = DiffusionModel(pipeline)
    with clocks_of(pipeline) as traced:
        record = model.record(**asked, seed=0)
    assert traced.latents == bare.latents
    assert [(row.component, row.tick, row.step) for row in record.ledger] == bare.calls
    assert record.ledger.steps == bare.steps < STEPS
    with clocks_of(pipeline) as forked:
        record.fork(-2)
    assert forked.latents == bare.latents
    with model.generate(**asked, seed=0) as block:
        assert [row.step for row in block.steps] == list(range(bare.steps))
