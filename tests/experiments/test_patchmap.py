"""A map's cells are runs: their values, their order, their bytes."""

from __future__ import annotations

import numpy as np
import pytest

from tests import tiny
from tests.watching import as_bytes, forwards_of
from workbench.errors import InputError, RunStopped
from workbench.experiments.experiment import Experiment
from workbench.experiments.metrics import difference, towards
from workbench.experiments.patchmap import PatchMap
from workbench.experiments.site_changes import PatchSpec
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.tracing.sites import Site

SITES = [Site.parse("unet.mid_block"), Site.parse("unet.down_blocks.0:output[0]")]
SETTINGS = {"seed": 0, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def runs():
    model = DiffusionModel(tiny.sd1())
    experiment = Experiment(source="a red circle", target="a blue square", num_inference_steps=4)
    source = model.record(experiment.source, capture=[SITES[0]], **SETTINGS)
    return model, experiment, source, model.record(experiment.target, **SETTINGS)


@pytest.fixture
def made(runs):
    _, experiment, source, target = runs
    source.captured.pop(str(SITES[1]), None)
    return PatchMap(experiment, source, target, SITES, window="half")


def test_map_begins_empty(made):
    assert made.values.shape == (2, 4)
    assert made.values.dtype == np.float32
    assert np.isnan(made.values).all()
    assert len(made.missing()) == 8


def test_cells_come_coarse_to_fine(runs):
    _, experiment, source, target = runs
    made = PatchMap(experiment, source, target, SITES[:1])
    made.steps = 16
    columns = [column for _, column in made.missing()]
    assert columns == [0, 8, 4, 12, 2, 6, 10, 14, 1, 3, 5, 7, 9, 11, 13, 15]


def test_every_row_has_its_first_column_before_any_has_its_second(made):
    assert made.missing() == [(0, 0), (1, 0), (0, 2), (1, 2), (0, 1), (0, 3), (1, 1), (1, 3)]


def test_cell_is_a_whole_run_with_the_patch_to_the_byte(runs, made):
    model, _, source, target = runs
    cell = made.compute(0, 2)
    patch = Patch("unet.mid_block", source=source, steps=(2, 3), branch="cond")
    assert made.patch_of(0, 2) == PatchSpec(site="unet.mid_block", steps=(2, 3), branch="cond")
    whole = model.record("a blue square", interventions=[patch], **SETTINGS)
    assert as_bytes(cell.image) == as_bytes(whole.images[0])
    assert as_bytes(cell.image) != as_bytes(target.images[0])
    assert cell.towards == towards(whole.images[0], target.images[0], source.images[0])
    assert cell.difference == difference(whole.images[0], target.images[0]) > 0
    assert made.values[0, 2] == np.float32(cell.towards)
    assert np.isfinite(made.values).sum() == 1
    assert (0, 2) not in made.missing()
    assert cell.experiment.interventions == (made.patch_of(0, 2),)


def test_cell_computes_only_its_tail(runs, made):
    assert made.patch_of(0, 3).steps == (3,)
    with forwards_of(runs[0].pipeline.unet) as calls:
        made.compute(0, 3)
    assert len(calls) == 1


def test_source_is_run_once_more_where_it_did_not_keep_the_site(runs, made):
    model, _, source, _ = runs
    site = str(SITES[1])
    with forwards_of(model.pipeline.unet) as calls:
        made.compute(1, 2)
    assert len(calls) == 4 + 2
    with forwards_of(model.pipeline.unet) as calls:
        again = made.compute(1, 2)
    assert len(calls) == 2
    kept = model.record("a red circle", capture=[site], **SETTINGS)
    assert [as_bytes(each.value) for each in source.captured[site]] == [
        as_bytes(each.value) for each in kept.captured[site]
    ]
    patch = Patch(site, source=kept, steps=(2, 3), branch="cond")
    whole = model.record("a blue square", interventions=[patch], **SETTINGS)
    assert as_bytes(again.image) == as_bytes(whole.images[0])


def test_windows_have_values_of_their_own(made):
    made.compute(0, 0)
    made.window = "1"
    assert np.isnan(made.values).all()
    made.window = "half"
    assert np.isfinite(made.values).sum() == 1


@pytest.mark.parametrize(("row", "column"), [(2, 0), (0, 4), (-1, 0), (0, -1)])
def test_cell_outside_is_refused(made, row, column):
    with pytest.raises(InputError, match="2 sites and 4 steps"):
        made.compute(row, column)


def test_without_guidance_every_row_is_patched():
    model = DiffusionModel(tiny.dit())
    arguments = {"class_labels": [3], "num_inference_steps": 2, "guidance_scale": 1.0}
    source = model.record(seed=0, **arguments)
    made = PatchMap(Experiment(source="a", target="b"), source, source, SITES, branch="uncond")
    assert "uncond" not in source.ledger.branches
    assert made.branch == "all"


class Impatient:
    """A listener that ends a run at its second call."""

    calls = 0

    def started(self, row):
        self.calls += 1
        if self.calls > 1:
            raise RunStopped("enough")

    def ticked(self, tick, latents):
        pass


def test_cell_that_was_stopped_has_no_value(made):
    with pytest.raises(RunStopped):
        made.compute(0, 2, Impatient())
    assert np.isnan(made.values).all()


def test_cells_that_begin_at_one_step_are_one_group_coarse_to_fine(made):
    made.window = "1"
    assert made.groups() == [[(0, 0), (1, 0)], [(0, 2), (1, 2)], [(0, 1), (1, 1)], [(0, 3), (1, 3)]]
    assert sorted(made.groups(rows=1)) == sorted([cell] for cell in made.missing())
    made.window = "to here"
    assert len(made.groups()) == 1
    assert sorted(made.groups()[0]) == sorted(made.missing())
    with pytest.raises(InputError, match="rows=0"):
        made.groups(rows=0)


def test_a_group_is_one_run_from_its_first_step_on_and_has_the_values_of_its_cells(runs, made):
    cells = made.groups()[0]
    made.estimate(cells)
    for cell in cells:
        made._values.clear()
        exact = made.compute(*cell).towards
        # A picture's channels are whole numbers, and rounding may tip one over.
        (other, *_) = made.estimate([cell, cells[0]])
        assert other == pytest.approx(exact, abs=1e-2)
        assert made.values[cell] == np.float32(other)
    with forwards_of(runs[0].pipeline.unet) as calls:
        made.estimate([(0, 3), (1, 3)])
    assert calls == [4]


def test_a_group_of_one_is_exact(made):
    (value,) = made.estimate([(0, 2)])
    assert value == made.compute(0, 2).towards
