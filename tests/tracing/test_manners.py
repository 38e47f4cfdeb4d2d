"""The block behaves wherever Python runs it: in a notebook's magics, at a breakpoint, after an interrupt."""

import gc
import io
import pdb
import sys
import threading
import weakref

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from IPython.core.interactiveshell import InteractiveShell
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.attention.request import Attention
from workbench.errors import BusyError, InputError, TraceError, WorkbenchError
from workbench.models.model import DiffusionModel
from workbench.tracing.ambient import Ambient

RUN = {**tiny.WORDED, "seed": 0}
CELL = """\
with model.generate("a red circle", num_inference_steps=2, seed=0) as run:
    for step in run.steps:
        seen.append(model.unet.mid_block.output.save())
"""


@pytest.fixture(scope="module")
def pipeline():
    return tiny.sd1(EulerAncestralDiscreteScheduler)


@pytest.fixture
def model(pipeline):
    return DiffusionModel(pipeline)


@pytest.fixture
def shell():
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


@pytest.mark.parametrize(("magic", "runs"), [("time", 1), ("timeit", 2), ("prun", 1), ("capture", 1)])
def test_under_a_notebooks_magics(model, shell, magic, runs):
    shell.user_ns |= {"model": model, "seen": (seen := [])}
    line = "-n 1 -r 2" if magic == "timeit" else "-q" if magic == "prun" else ""
    result = shell.run_cell(f"%%{magic} {line}\n{CELL}")
    assert result.success, result.error_in_exec
    assert len(seen) == 2 * runs
    assert len({str(as_bytes(each)) for each in seen}) == 2


def test_at_a_breakpoint_values_are_read_and_the_run_goes_on(model, monkeypatch):
    plain = model.record(**RUN, capture=["unet.mid_block"])
    out = io.StringIO()
    typed = "p tuple(model.unet.mid_block.output.shape)\nmodel.unet.mid_block.output[:] *= 2\ncontinue\n"
    debugger = pdb.Pdb(stdin=io.StringIO(typed), stdout=out, nosigint=True)
    debugger.use_rawinput = False
    monkeypatch.setattr(sys, "breakpointhook", lambda: debugger.set_trace(sys._getframe(1)))
    with model.generate(**RUN, num_images_per_prompt=1) as run:
        for _ in run.steps[1:2]:
            breakpoint()
            after = model.unet.mid_block.output.save()
    assert str(tuple(plain.at("unet.mid_block", step=1).shape)) in out.getvalue()
    assert torch.equal(after, 2 * plain.at("unet.mid_block", step=1))
    assert torch.equal(run.latents[0], plain.latents[0])
    assert not torch.equal(run.latents[-1], plain.latents[-1])


def test_after_an_interrupt_the_model_is_as_before_and_runs_again(model, pipeline):
    before, whole = footprint(pipeline), model.record(**RUN)

    def interrupted():
        with model.generate(**RUN) as run:
            for _ in run.steps[2:3]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert footprint(pipeline) == before
    assert as_bytes(model.record(**RUN).latents) == as_bytes(whole.latents)


def test_another_thread_is_refused_while_a_block_is_open(model):
    told = []

    def second():
        try:
            model.record(**RUN)
        except BusyError as error:
            told.append(str(error))

    with model.generate(**RUN) as run:
        run.steps[0:1]
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(told) == 1
    assert "already running" in told[0]


def test_another_model_over_the_same_pipeline_is_refused_while_a_block_is_open(model, pipeline):
    other = DiffusionModel(pipeline)
    whole = model.record(**RUN)
    with model.generate(**RUN) as run:
        run.latents.clone()
        with pytest.raises(BusyError, match="another that has its denoiser"):
            other.record(**RUN)
    assert as_bytes(run.record.latents) == as_bytes(whole.latents)
    assert as_bytes(other.record(**RUN).latents) == as_bytes(whole.latents)


def test_what_the_block_itself_calls_of_the_model_is_not_the_runs(model, pipeline):
    whole = model.record(**RUN, capture=["unet.conv_in"])
    taken = []
    with model.generate(**RUN) as run:
        for _ in run.steps:
            args, kwargs = model.unet.inputs
            taken.append(model.unet.conv_in.output.clone())
            with torch.no_grad():
                pipeline.unet(*args, **kwargs)
                pipeline.vae.decode(torch.zeros(1, 4, 8, 8))
            run.latents = run.latents
    assert run.record.ledger == whole.ledger
    assert as_bytes(run.record.calls) == as_bytes(whole.calls)
    assert as_bytes(taken) == as_bytes(list(whole["unet.conv_in"]))
    assert as_bytes(run.record.latents) == as_bytes(whole.latents)


class Counting(TorchDispatchMode):
    """Counts the operations that run under it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_of_the_block_does_not_see_the_pipeline(model):
    whole = model.record(**RUN)
    with model.generate(**RUN) as run:
        with Counting() as counting:
            for _ in run.steps[1:2]:
                hidden = model.unet.mid_block.output
            _ = hidden + 1
        assert counting.count < 10
    assert as_bytes(run.latents) == as_bytes(whole.latents)


def test_noise_drawn_in_the_block_is_the_blocks_own(model):
    """The pipeline draws from its generator; what the block draws comes from torch's own, and stays so."""
    torch.manual_seed(3)
    alone = [torch.randn(2) for _ in range(3)]
    torch.manual_seed(3)
    drawn = []
    with model.generate(**RUN) as run:
        for _ in run.steps[:3]:
            drawn.append(torch.randn(2))
    assert all(torch.equal(*pair) for pair in zip(alone, drawn, strict=True))
    assert as_bytes(run.latents) == as_bytes(model.record(**RUN).latents)


def unseeded(model, *, draws):
    """The latents, what the block drew and torch's state after a run that is given no seed."""
    torch.manual_seed(3)
    drawn = []
    with model.generate(**tiny.WORDED, output_type="latent") as run:
        for _ in run.steps:
            drawn += [torch.randn(2) for _ in range(draws)]
    return run.latents, drawn, torch.get_rng_state()


def test_noise_drawn_in_the_block_is_its_own_where_the_run_has_no_seed(model, pipeline):
    """The pipeline draws from torch's own generator, and goes on as it would without the block."""
    torch.manual_seed(3)
    alone = pipeline(**tiny.WORDED, output_type="latent").images
    after = torch.get_rng_state()
    quiet, none, quiet_after = unseeded(model, draws=0)
    loud, drawn, loud_after = unseeded(model, draws=1)
    assert as_bytes(quiet) == as_bytes(loud)
    assert as_bytes(quiet[-1]) == as_bytes(alone)
    assert torch.equal(quiet_after, after)
    assert torch.equal(loud_after, after)
    assert none == []
    assert as_bytes(unseeded(model, draws=1)[1]) == as_bytes(drawn)
    torch.manual_seed(3)
    assert not any(torch.equal(each, torch.randn(2)) for each in drawn)


def test_two_runs_without_a_seed_differ_also_where_one_is_stopped(model):
    torch.manual_seed(3)
    seen = []
    for stopped in (True, False):
        with model.generate(**tiny.WORDED) as run:
            for _ in run.steps[1]:
                seen.append(model.unet.input.save())
                if stopped:
                    run.stop()
    assert not torch.equal(*seen)


def elsewhere(work):
    """Do some work in another thread; return what it raised."""
    raised = []

    def attempt():
        try:
            work()
        except WorkbenchError as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, name="elsewhere")
    thread.start()
    thread.join(60)
    return raised


def test_another_thread_does_not_read_in_a_block_which_goes_on(model):
    whole = model.record(**RUN)
    with model.generate(**RUN) as run:
        value = model.unet.mid_block.output
        for use in (lambda: model.unet.conv_out.output, run.stop, lambda: next(run.steps[2])):
            (error,) = elsewhere(use)
            assert isinstance(error, TraceError)
            assert "opened in the thread 'MainThread' and is used in 'elsewhere'" in str(error)
        model.unet.mid_block.output = value
        assert [row.step for row in run.steps[2:]] == [2, 3]
    assert not run.stopped
    assert as_bytes(run.latents) == as_bytes(whole.latents)


def test_a_generator_closed_by_another_thread_says_so_and_frees_the_model(model, pipeline):
    before = footprint(pipeline)

    def passing():
        with model.generate(**RUN) as run:
            for _ in run.steps:
                yield model.unet.mid_block.output

    half_read = passing()
    next(half_read)
    (error,) = elsewhere(half_read.close)
    assert isinstance(error, TraceError)
    assert "in the thread that opened it" in str(error)
    del error, half_read
    assert footprint(pipeline) == before
    model.record(**RUN)


def test_a_read_restores_the_blocks_state_once_and_again_after_an_interrupt(model, monkeypatch):
    restored, restore = [], Ambient.restore

    def counted(self, now=None):
        restored.append(self)
        restore(self, now)
        if len(restored) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ambient, "restore", counted)

    def interrupted():
        with model.generate(**RUN):
            model.unet.conv_in.output.sum()
            assert len(restored) == 2
            model.unet.mid_block.output.sum()

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert restored[4] is restored[3]
    assert torch.is_grad_enabled()


# Steps


def test_ticks_are_gone_through_one_by_one():
    from diffusers import HeunDiscreteScheduler

    model = DiffusionModel(tiny.sd1(HeunDiscreteScheduler))
    with model.generate(**RUN) as run:
        seen = [(row.tick, row.index, float(run.latents.sum())) for row in run.ticks]
    assert [tick for tick, _, _ in seen] == list(range(run.ledger.ticks))
    assert [step for _, step, _ in seen] == [row.step for row in run.ledger]
    assert [total for _, _, total in seen] == pytest.approx([float(each.sum()) for each in run.latents])
    assert len(run.ticks) == run.ledger.ticks == 7


def test_ones_own_timesteps_are_the_runs_steps():
    model = DiffusionModel(tiny.sd1(EulerDiscreteScheduler))
    record = model.record("a red circle", timesteps=[900, 500, 100], seed=0)
    assert [(row.step, row.timestep) for row in record.ledger] == [(0, 900.0), (1, 500.0), (2, 100.0)]
    fork = record.fork(step=1)
    assert as_bytes(fork.latents) == as_bytes(record.latents)
    with model.generate("a red circle", timesteps=[900, 500, 100], seed=0) as run:
        assert [row.timestep for row in run.steps[-2:]] == [500.0, 100.0]


def test_ones_own_sigmas_are_the_runs_steps():
    pipeline = tiny.sd3()
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    arguments = {**tiny.CASES["sd3"].arguments, "sigmas": [1.0, 0.6, 0.2]}
    del arguments["num_inference_steps"]
    record = DiffusionModel(pipeline).record(**arguments, seed=0)
    assert [row.step for row in record.ledger] == [0, 1, 2]
    assert [row.sigma for row in record.ledger] == pytest.approx(
        [float(s) for s in pipeline.scheduler.sigmas[:3]]
    )
    assert as_bytes(record.fork(step=2).latents) == as_bytes(record.latents)


def test_steps_in_reverse_are_refused_clearly(model):
    with model.generate(**RUN) as run, pytest.raises(InputError, match="does not go forward"):
        list(run.steps[::-1])


def recorded(model):
    sites = ["unet.mid_block", "vae.decode", "scheduler.step", Attention()]
    return model.record("a red circle", num_inference_steps=2, seed=0, capture=sites)


def blocked(model):
    with model.generate("a red circle", num_inference_steps=2, seed=0) as run:
        for _ in run.steps:
            _ = model.unet.mid_block.output
    return run.record


def forked(model):
    return recorded(model).fork(1)


@pytest.mark.parametrize("made", [recorded, forked, blocked])
def test_what_a_run_kept_is_gone_with_its_record_and_waits_for_no_collector(made):
    model = DiffusionModel(tiny.sd1())
    made(model)
    gc.collect()
    gc.disable()
    try:
        record = made(model)
        alive = weakref.ref(record)
        del record
        assert alive() is None
    finally:
        gc.enable()
