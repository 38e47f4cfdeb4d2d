"""The promises of the tracer in more detail than the matrix of all families has it.

(That attention maps are true has its own tests beside the maps.)
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from tests import tiny
from tests.watching import as_bytes, footprint, latents_of
from workbench.errors import WorkbenchError
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

CASES = [
    pytest.param(tiny.CASES[name], id=name)
    for name in ("sd1", "sd3", "flux-cfg", "pixart", "wan22", "ddpm", "dit")
]
STEPS = 4


def bare_run(pipeline, arguments, seed=0):
    """Run without the tracer; return the latents of every tick, the output and torch's state after."""
    torch.manual_seed(11)
    with latents_of(pipeline) as latents:
        output = pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(seed))
    return latents, as_bytes(dict(output)), as_bytes(torch.get_rng_state())


def traced_run(pipeline, arguments, seed=0, **asked):
    torch.manual_seed(11)
    with latents_of(pipeline) as latents:
        record = DiffusionModel(pipeline).record(**arguments, seed=seed, **asked)
    return (latents, as_bytes(dict(record.output)), as_bytes(torch.get_rng_state())), record


def another(arguments):
    """Return arguments for another image of the same size."""
    if "prompt" in arguments:
        return {**arguments, "prompt": "a blue square"}
    if "class_labels" in arguments:
        return {**arguments, "class_labels": [7]}
    return arguments


def calls_of(record, case):
    """Return the rows of the denoiser that the case's site is in."""
    return [row for row in record.ledger if case.site.startswith(row.component + ".")]


def steps_at(run, case, chosen=slice(None)):
    """Go through the steps in which the case's denoiser is called first."""
    return (row for row in run.steps[chosen] if case.site.startswith(row.component + "."))


# Looking changes nothing


@pytest.mark.parametrize("case", CASES)
def test_without_a_seed_the_noise_is_the_pipelines_own(case):
    pipeline = case.build()
    torch.manual_seed(5)
    bare = pipeline(**case.arguments)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    record = DiffusionModel(pipeline).record(**case.arguments)
    assert as_bytes(dict(record.output)) == as_bytes(dict(bare))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_the_scheduler_draws_its_noise_from_the_generator_as_without_us(scheduler, eta):
    pipeline = tiny.sd1(scheduler)
    bare = pipeline(**tiny.WORDED, eta=eta, generator=torch.Generator("cpu").manual_seed(0))
    record = DiffusionModel(pipeline).record(**tiny.WORDED, eta=eta, seed=0)
    assert as_bytes(dict(record.output)) == as_bytes(dict(bare))


def test_control_the_comparison_sees_one_changed_bit():
    pipeline = tiny.sd1()
    bare = bare_run(pipeline, tiny.CASES["sd1"].arguments)

    def nudge(module, args, output):
        output.view(torch.int32).flatten()[0] ^= 1

    handle = pipeline.unet.conv_in.register_forward_hook(nudge)
    nudged = bare_run(pipeline, tiny.CASES["sd1"].arguments)
    handle.remove()
    assert nudged[0] != bare[0]
    assert as_bytes(torch.tensor(0.0)) != as_bytes(torch.tensor(-0.0))
    assert as_bytes(torch.tensor(float("nan"))) == as_bytes(torch.tensor(float("nan")))


def test_control_the_comparison_sees_a_drawn_random_number():
    pipeline = tiny.sd1()
    bare = bare_run(pipeline, tiny.CASES["sd1"].arguments)

    def draw(*_):
        torch.rand(1)

    handle = pipeline.unet.register_forward_hook(draw)
    drawn = bare_run(pipeline, tiny.CASES["sd1"].arguments)
    handle.remove()
    assert drawn[0] == bare[0]
    assert drawn[2] != bare[2]


# A no-op edit changes nothing


@pytest.mark.parametrize("case", CASES)
def test_writing_back_what_was_read_changes_no_byte(case):
    pipeline = case.build()
    bare = bare_run(pipeline, case.arguments)
    model = DiffusionModel(pipeline)
    torch.manual_seed(11)
    with latents_of(pipeline) as latents, model.generate(**case.arguments, seed=0) as run:
        for _ in steps_at(run, case):
            model.site(case.site).output = model.site(case.site).output
    assert (latents, as_bytes(dict(run.output)), as_bytes(torch.get_rng_state())) == bare


# A fork is exact


@pytest.mark.parametrize("case", CASES)
def test_control_an_edit_after_the_fork_shows_from_there_on_and_not_before(case):
    pipeline = case.build()
    model = DiffusionModel(pipeline)
    whole = model.record(**case.arguments, seed=0)
    source = model.record(**another(case.arguments), seed=3, capture=[case.site])
    fork = whole.fork(2, interventions=[Patch(case.site, source=source)])
    first = next(row.tick for row in calls_of(whole, case) if row.step >= 2)
    assert as_bytes(fork.latents[:first]) == as_bytes(whole.latents[:first])
    assert all(as_bytes(fork.latents[tick]) != as_bytes(whole.latents[tick]) for tick in range(first, STEPS))


# Nothing is left behind


def foreign(pipeline):
    """Put somebody else's hooks and shadowed methods on the pipeline."""
    pipeline.denoiser_calls = calls = []
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.register_forward_hook(lambda *_: None, always_call=True)
            part.register_forward_pre_hook(lambda *_: None, with_kwargs=False)
    denoiser = next(iter(DiffusionModel(pipeline).denoisers.values()))
    forward, step = denoiser.forward, pipeline.scheduler.step
    denoiser.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    pipeline.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)
    return denoiser


@pytest.fixture(params=CASES)
def inhabited(request):
    """A pipeline with foreign hooks, that has run once; its case; its footprint."""
    case = request.param
    pipeline = case.build()
    foreign(pipeline)
    pipeline(**case.arguments)
    return pipeline, case, footprint(pipeline)


class Interrupting:
    """Ends a run at its third call, as a Ctrl-C or a failing callback would."""

    def __init__(self, error):
        self.error = error

    def started(self, row):
        if row.step == 1:
            raise self.error

    def ticked(self, tick, latents):
        pass


def test_nothing_is_left_after_a_recorded_run(inhabited):
    pipeline, case, before = inhabited
    calls = len(pipeline.denoiser_calls)
    model = DiffusionModel(pipeline)
    record = model.record(**case.arguments, seed=0, capture=[case.site, f"{case.site}:inputs"])
    record.fork(2, interventions=[Patch(case.site, source=record)])
    assert footprint(pipeline) == before
    assert len(pipeline.denoiser_calls) > calls


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), SystemExit()], ids=repr)
def test_nothing_is_left_after_an_error_in_a_recorded_run(inhabited, error):
    pipeline, case, before = inhabited
    model = DiffusionModel(pipeline)
    source = model.record(**case.arguments, seed=0, capture=[case.site])
    with pytest.raises(type(error)):
        model.record(
            **case.arguments,
            seed=0,
            capture=[case.site],
            interventions=[Patch(case.site, source=source)],
            listener=Interrupting(error),
        )
    with pytest.raises(type(error)):
        source.fork(1, listener=Interrupting(error))
    assert footprint(pipeline) == before
    assert as_bytes(model.record(**case.arguments, seed=0).latents) == as_bytes(source.latents)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_nothing_is_left_after_an_error_in_a_block(inhabited, error):
    pipeline, case, before = inhabited
    model = DiffusionModel(pipeline)
    run = model.generate(**case.arguments, seed=0)

    def block():
        with run:
            for step in steps_at(run, case):
                model.site(case.site).output = 0.5 * model.site(case.site).output
                if step.step == 2:
                    raise error

    with pytest.raises(type(error)):
        block()
    assert footprint(pipeline) == before
    assert run.ledger.steps == 3
    assert model.record(**case.arguments, seed=0).ledger.steps == 4


def test_nothing_is_left_after_a_finished_block(inhabited):
    pipeline, case, before = inhabited
    model = DiffusionModel(pipeline)
    with model.generate(**case.arguments, seed=0) as run:
        for _ in steps_at(run, case, slice(None, None, 2)):
            model.site(case.site).output[:] = 0
    assert footprint(pipeline) == before


def test_nothing_is_left_after_a_bad_request(inhabited):
    pipeline, case, before = inhabited
    model = DiffusionModel(pipeline)
    with pytest.raises(WorkbenchError):
        model.record(**case.arguments, capture=["no.such.module"])
    with pytest.raises(WorkbenchError):
        model.record(**case.arguments, no_such_argument=1)
    with pytest.raises(WorkbenchError), model.generate(**case.arguments):
        model.site(case.site).output = torch.zeros(1)
    assert footprint(pipeline) == before


def test_control_the_footprint_sees_a_hook_a_method_an_attribute_and_a_lost_hook():
    pipeline = tiny.sd1()
    pipeline(**tiny.CASES["sd1"].arguments)
    handle = pipeline.unet.register_forward_hook(lambda *_: None)
    before = footprint(pipeline)

    hook = pipeline.unet.mid_block.register_forward_hook(lambda *_: None, with_kwargs=True)
    assert footprint(pipeline) != before
    hook.remove()
    assert footprint(pipeline) == before

    pipeline.scheduler.step = pipeline.scheduler.step
    assert footprint(pipeline) != before
    del pipeline.scheduler.step
    pipeline.unet.forward = pipeline.unet.forward
    assert footprint(pipeline) != before
    del pipeline.unet.forward

    pipeline.unet.conv_in.traced = True
    assert footprint(pipeline) != before
    del pipeline.unet.conv_in.traced
    assert footprint(pipeline) == before

    torch.set_grad_enabled(False)
    assert footprint(pipeline) != before
    torch.set_grad_enabled(True)

    handle.remove()
    assert footprint(pipeline) != before
