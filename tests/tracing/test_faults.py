"""Whatever fails and wherever: nothing of ours is left, nothing foreign is gone, the model runs on."""

from __future__ import annotations

import gc
import random
import weakref
from functools import cache

import psutil
import pytest
import torch
from torch import nn

from tests import tiny
from tests.faults import ERRORS, STAGES, Fault, Injector
from tests.watching import as_bytes, footprint
from workbench.attention.request import Attention
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.tracing.rig import Rig

FAULTS = 90
"""Of each run on each pipeline: 720 in all."""

SOME = 10
"""Of them, in the ordinary run of the tests: 80 in all."""


class Scene:
    """A pipeline that somebody else has hooks on, and what it should be like after any fault."""

    def __init__(self, name):
        case = tiny.CASES[name]
        self.site = case.site
        self.arguments = {**case.arguments, "num_inference_steps": 2, "output_type": "latent", "seed": 0}
        self.pipeline = case.build()
        self.injector = Injector()
        self.injector.inhabit(self.pipeline)
        self.model = DiffusionModel(self.pipeline)
        self.model.record(**self.arguments)
        self.source = self.model.record(**self.arguments, capture=[self.site, f"{self.site}:inputs"])
        self.output = as_bytes(self.source.output.images)
        self.scheduler = as_bytes(vars(self.pipeline.scheduler))
        self.footprint = footprint(self.pipeline)
        self.belongings = belongings(self.pipeline)

    def damage(self):
        """Return what is not as it should be, now and after another run."""
        found = []
        if footprint(self.pipeline) != self.footprint:
            found.append("hooks, methods or attributes")
        if belongings(self.pipeline) != self.belongings:
            found.append("what the modules have")
        try:
            again = self.model.record(**self.arguments)
        except Exception as error:  # noqa: BLE001
            return [*found, f"the model does not run: {error}"]
        if as_bytes(again.output.images) != self.output:
            found.append("the image")
        if as_bytes(vars(self.pipeline.scheduler)) != self.scheduler:
            found.append("the scheduler")
        return found


def belongings(pipeline):
    """Spell what every module has: the very objects, and numbers and texts by their value."""
    found = {}
    for name, part in pipeline.components.items():
        for path, module in part.named_modules(prefix=name) if isinstance(part, nn.Module) else ():
            found[path] = {
                key: value if isinstance(value, (int, float, str, bool, type(None))) else id(value)
                for key, value in vars(module).items()
            }
    return found


def recorded(scene):
    scene.model.record(
        **scene.arguments,
        capture=[scene.site, f"{scene.site}:inputs", Attention()],
        interventions=[Patch(scene.site, source=scene.source)],
    )


def forked(scene):
    scene.source.fork(1, capture=[scene.site], interventions=[Patch(scene.site, source=scene.source)])


def in_a_block(scene):
    site = scene.model.site(scene.site)
    with scene.model.generate(**scene.arguments) as run:
        for _ in run.steps:
            site.input = site.input + 1
            site.output = 0.5 * site.output


def around_a_loop(scene):
    generator = torch.Generator().manual_seed(0)
    asked = {name: given for name, given in scene.arguments.items() if name != "seed"}
    patch = Patch(scene.site, source=scene.source)
    # Held, so that what the block leaves is not tidied up by the garbage collector.
    scene.block = scene.model.trace_loop(
        asked["prompt"], capture=[scene.site, Attention()], interventions=[patch]
    )
    with scene.block:
        scene.pipeline(**asked, generator=generator)


RUNS = {"recorded": recorded, "forked": forked, "in a block": in_a_block, "around a loop": around_a_loop}
CASES = pytest.mark.parametrize(
    ("pipeline", "run"), [(pipeline, run) for pipeline in ("sd1", "flux") for run in RUNS]
)


@cache
def scene_of(pipeline):
    return Scene(pipeline)


def faults_of(scene, run):
    """Draw faults of a run: as many of each stage, each kind of error in turn, points at random."""
    with scene.injector.armed():
        RUNS[run](scene)
    counts = dict(scene.injector.counts)
    draw = random.Random(run)
    for index in range(FAULTS):
        stage = STAGES[index % len(STAGES)]
        yield Fault(stage, draw.randrange(counts[stage]), ERRORS[index // len(STAGES) % len(ERRORS)])


def suffer(scene, run, faults):
    """Let each fault fall into a run of its own; return the damage each has done."""
    damaged = []
    for fault in faults:
        error = None
        try:
            with scene.injector.armed(fault):
                RUNS[run](scene)
        except fault.error as raised:
            error = raised
        assert error is not None, f"{fault} did not come out of the run"
        assert error is scene.injector.fallen, f"{error!r} came out in place of {fault}"
        del error
        if damage := scene.damage():
            damaged.append((fault, damage))
            scene = Scene("sd1" if hasattr(scene.pipeline, "unet") else "flux")
    return damaged


@CASES
def test_a_fault_leaves_nothing_behind(pipeline, run):
    scene = scene_of(pipeline)
    faults = random.Random(0).sample(list(faults_of(scene, run)), SOME)
    assert suffer(scene, run, faults) == []


@pytest.mark.soak
@CASES
def test_many_faults_leave_nothing_behind(pipeline, run):
    scene = scene_of(pipeline)
    faults = list(faults_of(scene, run))
    assert len(faults) == FAULTS
    assert {fault.error for fault in faults} == set(ERRORS)
    assert suffer(scene, run, faults) == []


@CASES
def test_the_points_are_in_every_stage_of_a_run(pipeline, run):
    scene = scene_of(pipeline)
    with scene.injector.armed():
        RUNS[run](scene)
    assert {stage for stage in STAGES if scene.injector.counts[stage] > 10} == set(STAGES)


@pytest.mark.parametrize("run", RUNS)
def test_control_a_rig_that_sweeps_nothing_is_found_out(monkeypatch, run):
    scene = Scene("sd1")
    faults = [fault for fault in faults_of(scene, run) if fault.stage == "forward"][:1]
    monkeypatch.setattr(Rig, "sweep", lambda self: None)
    damaged = suffer(scene, run, faults)
    assert [fault for fault, _ in damaged] == faults
    assert "hooks, methods or attributes" in damaged[0][1]


def test_control_a_lost_hook_and_a_changed_attribute_are_found_out():
    scene = Scene("sd1")
    assert scene.damage() == []
    scene.pipeline.unet.mid_block.training = True
    assert scene.damage() == ["what the modules have"]
    scene.pipeline.unet.mid_block.training = False
    next(each for each in scene.pipeline.unet.modules() if each._forward_hooks)._forward_hooks.clear()
    assert "hooks, methods or attributes" in scene.damage()


CYCLES = 200


def opened_and_closed(model, arguments, cycle):
    """Open a block, read and close it: to its end, early, or by an error, in turn."""
    run = model.generate(**arguments)
    try:
        with run:
            if cycle % 4:
                model.text_encoder.output.save()
                model.unet.mid_block.output.clone()
            if cycle % 4 > 1:
                raise KeyError(cycle)
    except KeyError:
        pass
    session = run._session
    return [weakref.ref(each) for each in (run, run.record, session, session.rig, session.clock)]


def test_two_hundred_blocks_leave_no_object_and_no_memory_behind():
    pipeline = tiny.sd1()
    model, process = DiffusionModel(pipeline), psutil.Process()
    arguments = {"prompt": "a red circle", "num_inference_steps": 1, "output_type": "latent"}
    gone, objects, memory = [], [], []
    for cycle in range(CYCLES):
        gone += opened_and_closed(model, arguments, cycle)
        if cycle in (CYCLES // 2 - 1, CYCLES - 1):
            gc.collect()
            objects.append(len(gc.get_objects()) - len(gone))
            memory.append(process.memory_info().rss)
    assert len(gone) == 5 * CYCLES
    assert [reference for reference in gone if reference() is not None] == []
    assert objects[1] - objects[0] < CYCLES / 4
    assert memory[1] - memory[0] < 8e6


def test_control_a_run_that_is_kept_is_found_out():
    model = DiffusionModel(tiny.sd1())
    kept = model.generate("a red circle", num_inference_steps=1, output_type="latent")
    with kept:
        pass
    reference = weakref.ref(kept)
    gc.collect()
    assert reference() is kept
