"""A control moves an activation exactly as far as its patch, and nowhere in particular."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench.interventions.control import RandomDirection
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.tracing.sites import Site

SITE = "unet.mid_block"
SETTINGS = {"seed": 0, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def runs():
    model = DiffusionModel(tiny.sd1())
    source = model.record("a red circle", capture=[SITE], **SETTINGS)
    return model, source, model.record("a blue square", capture=[SITE], **SETTINGS)


def test_control_has_the_patchs_place(runs):
    patch = Patch(SITE, source=runs[1], steps=[1, 2], branch="cond")
    control = RandomDirection.of(patch, seed=5)
    assert (control.site, control.steps, control.branch, control.seed) == (SITE, (1, 2), "cond", 5)


def test_control_moves_each_row_as_far_as_the_patch(runs):
    _, source, target = runs
    patch = Patch(SITE, source=source, branch="cond")
    site, row = Site.parse(SITE), target.ledger[1]
    value = target.at(SITE, step=1, branch="cond")
    patched = patch.new_value(site, value, row, "cond") - value
    moved = RandomDirection.of(patch).new_value(site, value, row, "cond") - value
    assert patched.norm() > 0
    assert float(moved.norm()) == pytest.approx(float(patched.norm()), rel=1e-3)
    cosine = torch.cosine_similarity(patched.flatten(), moved.flatten(), dim=0)
    assert abs(float(cosine)) < 0.3


def test_directions_differ_by_seed_and_call_and_come_again(runs):
    _, source, target = runs
    patch, site = Patch(SITE, source=source, branch="cond"), Site.parse(SITE)
    value = target.at(SITE, step=1, branch="cond")

    def moved(seed, call):
        return RandomDirection.of(patch, seed).new_value(site, value, target.ledger[call], "cond")

    assert moved(0, 1).equal(moved(0, 1))
    assert not moved(0, 1).equal(moved(1, 1))
    directions = [(moved(0, call) - value).flatten() for call in (1, 2)]
    assert abs(float(torch.cosine_similarity(*directions, dim=0))) < 0.3


def test_control_of_a_patch_that_changes_nothing_changes_nothing(runs):
    model, source, target = runs
    none = [RandomDirection.of(Patch(SITE, source=target))]
    assert as_bytes(model.record("a blue square", interventions=none, **SETTINGS).images) == as_bytes(
        target.images
    )
    some = [RandomDirection.of(Patch(SITE, source=source))]
    assert as_bytes(model.record("a blue square", interventions=some, **SETTINGS).images) != as_bytes(
        target.images
    )
