"""The promises of the tracer on every family of pipelines, and that the table in README.md is true."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from tests import tiny
from tests.tracing import matrix
from workbench import zoo
from workbench.interventions.patch import Patch
from workbench.tracing import session
from workbench.tracing.branches import Branches
from workbench.tracing.replay import Replay
from workbench.tracing.rig import Rig
from workbench.tracing.stages import Stages
from workbench.tracing.structure import map_tensors
from workbench.tracing.trace import Trace


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def subject(request):
    return matrix.Subject(request.param)


@pytest.mark.parametrize("promise", list(matrix.PROMISES))
def test_a_family_keeps_a_promise(subject, promise):
    if (subject.name, promise) in matrix.EXCEPTIONS:
        with pytest.raises(AssertionError):
            matrix.PROMISES[promise](subject)
    else:
        matrix.PROMISES[promise](subject)


def test_the_table_says_of_a_family_what_is_found(subject):
    """Its marks are those that the tests above hold the family to."""
    rows = {each[0]: each for each in map(matrix.cells, matrix.written())}
    exceptions = {
        promise: reason for (name, promise), reason in matrix.EXCEPTIONS.items() if name == subject.name
    }
    marks = [f"no: {exceptions[each]}" if each in exceptions else "✓" for each in matrix.PROMISES]
    assert rows.get(subject.name) == [*matrix.facts(subject), *marks]


def test_the_table_has_a_row_for_each_family_and_a_column_for_each_promise():
    lines = matrix.written()
    assert lines[:2] == matrix.head()
    assert [matrix.cells(each)[0] for each in lines[2:]] == list(tiny.FAMILIES)
    assert len(tiny.FAMILIES) >= 24


@pytest.mark.parametrize("name", zoo.models())
def test_the_shipped_models_keep_every_promise(name):
    def build():
        pipeline = DiffusionPipeline.from_pretrained(zoo.path(name))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    worded = name != "shapes-ddpm"
    arguments = {**zoo.settings(name), **tiny.WORDED} if worded else {"num_inference_steps": 4}
    site = "transformer.transformer_blocks.0.ff" if name == "shapes-mmdit" else "unet.mid_block"
    subject = matrix.Subject(name, tiny.Case(build, arguments, site))
    for promise in matrix.PROMISES.values():
        promise(subject)


# Each promise can be broken: a tracer that does something wrong is found out


def nudged(value):
    return map_tensors(value, lambda tensor: tensor * 1.001 if tensor.is_floating_point() else tensor)


BREAKING = {
    "tree": (matrix, "outline", lambda model, outline=matrix.outline: outline(model)[:-1]),
    "ledger": (Stages, "step_of", lambda self, tick: 0),
    "branches": (Branches, "_order", lambda *_: ("cond", "uncond")),
    "read": (Trace, "_pass", lambda self, place, value, _pass=Trace._pass: nudged(_pass(self, place, value))),
    "replace": (Trace, "replace", lambda self, site, new: self.value(site)),
    "zero": (Trace, "value", lambda self, site, value=Trace.value: nudged(value(self, site))),
    "looking": (session, "keep", lambda value: torch.rand(1)),
    "patch": (Patch, "new_value", lambda self, site, value, row, branch: nudged(value)),
    "fork": (Replay, "covers", lambda self, row: False),
    "tidy": (Rig, "sweep", lambda self: None),
}


@pytest.mark.parametrize("promise", list(matrix.PROMISES))
def test_control_a_promise_can_be_broken(monkeypatch, promise):
    subject = matrix.Subject("sd1")
    if promise not in ("ledger", "branches", "looking"):
        assert subject.record.images
    monkeypatch.setattr(*BREAKING[promise])
    with pytest.raises(AssertionError):
        matrix.PROMISES[promise](subject)
