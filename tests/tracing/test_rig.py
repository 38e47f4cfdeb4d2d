"""What a rig puts on a model comes off again: whoever else is there, and wherever the interrupt falls."""

import inspect
import opcode
import sys
from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from tests import tiny
from tests.watching import footprint
from workbench.errors import BusyError
from workbench.models import model as model_module
from workbench.models.model import DiffusionModel
from workbench.tracing import rig as rig_module
from workbench.tracing import session as session_module
from workbench.tracing import trace as trace_module
from workbench.tracing.rig import Rig


class Doubler(nn.Module):
    def forward(self, value):
        return 2 * value


ONE = torch.ones(1)


def tables(module):
    return {
        name: dict(table)
        for name, table in vars(module).items()
        if name.endswith(("hooks", "kwargs", "called"))
    }


def test_hooks_see_and_change_what_passes():
    module, rig = Doubler(), Rig()
    rig.before(module, lambda _module, args, kwargs: ((args[0] + 1,), kwargs))
    rig.after(module, lambda _module, args, kwargs, output: output + 10)
    assert module(ONE) == 14
    rig.sweep()
    assert module(ONE) == 2


class Counter:
    def __init__(self):
        self.count = 0

    def step(self, by, *, generator=None):
        self.count += by
        return self.count


def watched_counter():
    counter, rig, seen = Counter(), Rig(), []
    rig.wrap(
        counter, "step", lambda step: lambda *args, **kwargs: (seen.append(args), step(*args, **kwargs))[1]
    )
    return counter, rig, seen


def test_a_wrapped_method_says_what_it_takes_as_before():
    """Pipelines pass a generator only to a step whose signature has one."""
    counter, rig, _ = watched_counter()
    assert inspect.signature(counter.step) == inspect.signature(Counter().step)
    rig.sweep()
    assert "step" not in vars(counter)


def test_a_copy_made_while_its_original_is_watched_is_plain_and_on_its_own():
    counter, rig, seen = watched_counter()
    counter.step(1)
    copied = deepcopy(counter)
    assert (copied.step(10), counter.step(1)) == (11, 2)
    assert seen == [(1,), (1,)]
    rig.sweep()
    assert copied.step(10) == 21


def test_a_copy_keeps_what_somebody_else_has_put_on_its_original():
    counter, rig = Counter(), Rig()
    counter.step = abs
    rig.wrap(counter, "step", lambda step: step)
    assert deepcopy(counter).step is abs
    assert deepcopy(vars(counter))["step"] is vars(counter)["step"]


def test_a_sweep_takes_off_ours_and_leaves_others():
    module, ours, theirs = Doubler(), Rig(), Rig()
    module.register_forward_hook(lambda *_: None, always_call=True)
    theirs.after(module, lambda *_: None)
    theirs.wrap(module, "forward", lambda forward: lambda value: forward(value) + 1)
    before, forward = tables(module), module.forward
    ours.before(module, lambda *_: None)
    ours.after(module, lambda *_: None)
    ours.wrap(module, "forward", lambda inner: lambda value: inner(value) * 100)
    assert module(ONE) == 300
    assert tables(module) != before
    ours.sweep()
    ours.sweep()
    assert tables(module) == before
    assert module.forward is forward
    assert module(ONE) == 3
    theirs.sweep()
    assert "forward" not in vars(module)


def test_one_hook_can_be_dropped_and_the_others_stay():
    module, rig = Doubler(), Rig()
    first = rig.after(module, lambda *args: args[-1] + 1)
    rig.after(module, lambda *args: args[-1] + 10)
    rig.drop(first)
    assert module(ONE) == 12
    rig.sweep()


def test_a_method_wrapped_twice_comes_back_as_it_was():
    module, rig = Doubler(), Rig()
    rig.wrap(module, "forward", lambda forward: lambda value: forward(value) + 1)
    rig.wrap(module, "forward", lambda forward: lambda value: forward(value) * 10)
    assert module(ONE) == 30
    rig.sweep()
    assert "forward" not in vars(module)
    assert module(ONE) == 2


def test_a_wrapped_method_keeps_its_signature():
    module, rig = Doubler(), Rig()
    before = inspect.signature(module.forward)
    rig.wrap(module, "forward", lambda forward: lambda *args: forward(*args))
    assert inspect.signature(module.forward) == before
    rig.sweep()


def test_a_method_somebody_shadows_after_us_stays_theirs():
    module, rig = Doubler(), Rig()
    rig.wrap(module, "forward", lambda forward: lambda value: forward(value) + 1)
    module.forward = theirs = lambda value: value
    rig.sweep()
    assert module.forward is theirs


QUIET = {
    opcode.opmap[name]
    for name in ("NOP", "JUMP_FORWARD", "RETURN_VALUE", "RETURN_CONST")
    if name in opcode.opmap
}
"""Opcodes before which Python acts on no signal: it does so after calls and on jumping back."""


def interrupted(run, point, files):
    """Call ``run`` with a KeyboardInterrupt at the ``point``-th opcode of the given files.

    Returns:
        Whether the interrupt fell; not, when the run has fewer opcodes there.
    """
    left = point
    fell = False

    def at_opcode(frame, event, argument):
        nonlocal left, fell
        frame.f_trace_opcodes = True
        if event == "opcode" and not fell and frame.f_code.co_code[frame.f_lasti] not in QUIET:
            left -= 1
            if left < 0:
                fell = True
                raise KeyboardInterrupt
        return at_opcode

    def at_call(frame, event, argument):
        if not fell and frame.f_code.co_filename in files:
            frame.f_trace_opcodes = True
            return at_opcode
        return None

    sys.settrace(at_call)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return fell


FILES = {each.__file__ for each in (rig_module, session_module, trace_module, model_module)}


def recorded(model):
    record = model.record(num_inference_steps=1, seed=0, capture=["unet.mid_block"])
    assert len(record["unet.mid_block"]) == 1


def in_a_block(model):
    with model.generate(num_inference_steps=1, seed=0):
        model.unet.mid_block.output = model.unet.mid_block.output * 2


def carelessly(model):
    rig = Rig()
    rig.after(model.pipeline.unet, lambda *_: None)
    model.pipeline(num_inference_steps=1)
    rig.sweep()


def leaks(run, stride):
    """Return the points at which an interrupt leaves something behind, and how many points there were."""
    leaked, point = [], 0
    model, before = None, None
    while True:
        if model is None:
            model = DiffusionModel(tiny.ddpm())
            model.record(num_inference_steps=1)
            before = footprint(model.pipeline)
        if not interrupted(partial(run, model), point, FILES):
            return leaked, point
        if footprint(model.pipeline) != before or busy(model):
            leaked.append(point)
            torch.set_grad_enabled(True)
            model = None
        point += stride


def busy(model):
    try:
        model.generate(num_inference_steps=1).__enter__().__exit__(KeyboardInterrupt, None, None)
    except BusyError:
        return True
    return False


@pytest.mark.parametrize("run", [recorded, in_a_block])
def test_an_interrupt_at_any_opcode_leaves_nothing_behind(run):
    leaked, points = leaks(run, stride=5)
    assert points > 500
    assert leaked == []


@pytest.mark.soak
@pytest.mark.parametrize("run", [recorded, in_a_block])
def test_an_interrupt_at_every_single_opcode_leaves_nothing_behind(run):
    leaked, _ = leaks(run, stride=1)
    assert leaked == []


def test_control_the_interrupts_find_a_sweep_without_its_finally():
    leaked, points = leaks(carelessly, stride=11)
    assert points > 20
    assert leaked
