"""A layer × step map of patches between two runs, filled a cell at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from workbench.errors import InputError
from workbench.experiments.branching import Branch
from workbench.experiments.experiment import Experiment
from workbench.experiments.metrics import difference, towards
from workbench.experiments.site_changes import PatchSpec
from workbench.experiments.together import ROWS, evenly, fork_rows, goes_together
from workbench.experiments.windows import WINDOWS, window
from workbench.tracing.record import Record
from workbench.tracing.session import Listener
from workbench.tracing.sites import Site


@dataclass(frozen=True)
class Cell:
    """One patched run.

    Attributes:
        experiment: the experiment with this patch.
        record: the run.
        towards: how far its picture moved from the target's to the source's (see `towards`).
        difference: how far its picture is from the target's, in [0, 1].
        branches: the runs that leave it.
    """

    experiment: Experiment
    record: Record
    towards: float
    difference: float
    branches: tuple[Branch, ...] = ()

    @classmethod
    def of(
        cls, experiment: Experiment, record: Record, runs: tuple[Record, Record], branches: Any = ()
    ) -> Cell:
        """Return a run measured against its source's and its target's."""
        image, (source, target) = record.images[0], (run.images[0] for run in runs)
        return cls(experiment, record, towards(image, target, source), difference(image, target), branches)

    @property
    def image(self) -> Image.Image:
        """The patched run's picture."""
        image: Image.Image = self.record.images[0]
        return image


class PatchMap:
    """Every site × step of one pair of runs, under one window.

    A cell is a run of its own, computed from its first patched step on, so what it shows is exact. Values
    alone come cheaper: cells that begin at one step are the rows of one run, and within rounding the same.

    Args:
        experiment: the plain experiment, without patches.
        source: its source's run.
        target: its target's run.
        sites: the rows.
        window: which steps a cell covers, see `workbench.experiments.windows`.
        branch: which guidance branch is patched.
    """

    def __init__(
        self,
        experiment: Experiment,
        source: Record,
        target: Record,
        sites: list[Site],
        *,
        window: str = "half",
        branch: str = "cond",
    ) -> None:
        self.experiment = experiment
        self.source = source
        self.target = target
        self.sites = sites
        self.window = window
        self.branch = branch if branch in target.ledger.branches else "all"
        self.steps = target.ledger.steps
        self._values: dict[tuple[str, int, str], float] = {}
        self._together: bool | None = None

    @property
    def values(self) -> np.ndarray:
        """How far each cell moved towards the source, ``(sites, steps)``, float32; NaN is not computed."""
        found = [
            [self._values.get((str(site), step, self.window), np.nan) for step in range(self.steps)]
            for site in self.sites
        ]
        return np.array(found, np.float32).reshape(len(self.sites), self.steps)

    def missing(self) -> list[tuple[int, int]]:
        """Return the cells not computed yet, coarse to fine, so that a half-filled map shows the whole."""
        empty = np.argwhere(np.isnan(self.values))
        return sorted(((int(row), int(column)) for row, column in empty), key=lambda cell: _depth(cell[1]))

    def patch_of(self, row: int, column: int) -> PatchSpec:
        """Return the patch that a cell stands for."""
        if not (0 <= row < len(self.sites) and 0 <= column < self.steps):
            raise InputError(
                f"The map has {len(self.sites)} sites and {self.steps} steps, so no cell {row}, {column}."
            )
        steps = window(self.window, column, self.steps)
        return PatchSpec(site=str(self.sites[row]), steps=steps, branch=self.branch)

    def find(self, changes: Sequence[Any]) -> tuple[str, int, int] | None:
        """Return the window, row and column of the cell that has these changes; None if none has."""
        if len(changes) != 1 or not isinstance(changes[0], PatchSpec):
            return None
        patch, sites = changes[0], [str(site) for site in self.sites]
        alike = PatchSpec(site=patch.site, steps=patch.steps, branch=self.branch)
        if alike != patch or patch.site not in sites:
            return None
        for name in WINDOWS:
            for column in range(self.steps):
                if window(name, column, self.steps) == patch.steps:
                    return name, sites.index(patch.site), column
        return None

    def compute(self, row: int, column: int, listener: Listener | None = None) -> Cell:
        """Run a cell's patch and note its value."""
        patch = self.patch_of(row, column)
        key = (patch.site, column, self.window)
        self._provide([patch.site], listener)
        experiment = self.experiment.model_copy(update={"interventions": (patch,)})
        record = experiment.patch(self.source, self.target, listener=listener)
        assert record is not None
        cell = Cell.of(experiment, record, (self.source, self.target))
        self._values[key] = cell.towards
        return cell

    def groups(self, rows: int = ROWS) -> list[list[tuple[int, int]]]:
        """Return the cells not computed yet in groups of about ``rows`` that begin at one step.

        The groups come coarse to fine, as `missing` has their cells.

        Raises:
            InputError: ``rows`` is no positive number.
        """
        if rows < 1:
            raise InputError(f"rows={rows!r} is no number of cells to compute at once. Give at least 1.")
        by_step: dict[int, list[tuple[int, int]]] = {}
        for row, column in self.missing():
            by_step.setdefault(self._first(row, column), []).append((row, column))
        return [group for cells in by_step.values() for group in evenly(cells, rows)]

    def estimate(self, cells: Sequence[tuple[int, int]], listener: Listener | None = None) -> list[float]:
        """Run several cells' patches as the rows of one run, and note their values.

        Cells of one group, see `groups`, cost least. Where rows of one run are not what runs of their own
        are, each cell is computed alone.

        Args:
            cells: each with its row and column.
            listener: told how the run goes on.

        Returns:
            Each cell's value, within rounding what `compute` finds.
        """
        if self._together is None:
            self._together = goes_together(self.target)
        if len(cells) == 1 or not self._together:
            return [self.compute(row, column, listener).towards for row, column in cells]
        # The window may be changed while they run.
        name, patches = self.window, [self.patch_of(row, column) for row, column in cells]
        self._provide([patch.site for patch in patches], listener)
        made = [self.experiment.model_copy(update={"interventions": (patch,)}) for patch in patches]
        records = fork_rows(
            [self.target] * len(cells),
            [each.bound(self.source, self.target) for each in made],
            min(each.first_step(self.steps) for each in made),
            listener=listener,
        )
        target, source = self.target.images[0], self.source.images[0]
        found = [towards(record.images[0], target, source) for record in records]
        for patch, (_, column), value in zip(patches, cells, found, strict=True):
            self._values[(patch.site, column, name)] = value
        return found

    def _first(self, row: int, column: int) -> int:
        made = self.experiment.model_copy(update={"interventions": (self.patch_of(row, column),)})
        return made.first_step(self.steps)

    def _provide(self, sites: Sequence[str], listener: Listener | None) -> None:
        """See that the source has the sites' activations, running it once more if it must."""
        lacking = [site for site in dict.fromkeys(sites) if site not in self.source.captured]
        if lacking:
            again = self.source.fork(self.experiment.source_from, capture=lacking, listener=listener)
            self.source.captured |= {site: again.captured[site] for site in lacking}


def _depth(column: int) -> int:
    """Return how late a column comes when each pass halves the gaps (0, 8, 4, 12, 2, …)."""
    return 0 if column == 0 else 32 - (column & -column).bit_length()
