"""`Sweep`: one experiment at every point of some axes, measured, with its controls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.experiments.change import Runs
from workbench.experiments.changes import TurnSpec
from workbench.experiments.experiment import Experiment
from workbench.experiments.labelled import dataset, label, need_xarray
from workbench.experiments.measured import RunMetric, run_metric
from workbench.experiments.sampler import sampling
from workbench.experiments.site_changes import CorruptSpec
from workbench.experiments.sweepcell import cell_of, check_axes, step_of
from workbench.experiments.sweeping import Progress, Sweeper
from workbench.experiments.sweepplan import PLAN
from workbench.experiments.sweepstore import Result, SweepStore
from workbench.experiments.together import ROWS
from workbench.interventions.corrupt import Corrupt
from workbench.interventions.intervention import Intervention
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record
from workbench.tracing.session import Listener

if TYPE_CHECKING:
    import xarray

SEEDS = 4
"""How many seeds a sweep has that names none: what one seed shows may be that seed's."""


class Sweep:
    """One experiment at every point of some axes.

    A point is a value of each axis, and its cell an `Experiment`: by default the patch of ``site`` in the
    window around ``step``, in the runs of ``seed``, beside what the experiment changes itself. Without an
    axis ``site`` the others say where and when the experiment's own patches act (or, if it has none, what
    else it changes). What else an axis is called stands in the prompts in braces: ``source="a {colour}
    circle"`` with an axis ``colour``.

    Cells share what they can: each pair of source and target is run once, what precedes a patch is replayed,
    and cells that begin at one step are rows of one run. Their values are within rounding those of runs of
    their own; `run_at` runs a cell by itself, exactly.

    Args:
        experiment: what is the same in all cells: the model, the prompts, the settings. It names its steps.
        axes: the values of each axis, by name. ``site``: where (several at once as a tuple); ``step``:
            which column of the map, -1 being the last; ``window``, ``branch``; ``heads``: a head or a tuple
            of them; ``words``: a word of both prompts, or ``"red -> blue"`` for the source's red where the
            target has blue, or a tuple of these; ``seed``, four from the experiment's on if it is not given.
        cell: makes the experiment of a point, for other changes than one patch; the axes may then be any.
        window: which steps a cell covers, see `workbench.experiments.windows`.
        branch: which guidance branch is patched at a ``site``.
        metrics: what is measured, by name (see `workbench.experiments.measured.METRICS`) or as functions of
            the records of the run, the source and the target.
        corrupt: changes of the target's run that all cells keep: with `Corrupt` and one prompt for both
            runs this is the causal trace, and a patch restores what it patches.
        controls: whether each cell has its random direction beside it, and each pair of runs its identity
            and its noise floor; see `run`.
        rows: about how many cells are computed at once; 1 makes each a run of its own.

    Attributes:
        axes: the values of each axis.
        points: every point, the last axis going first.
        cells: the experiment of each point.
        corrupting: what the target is corrupted with, as data.

    Raises:
        InputError, UnknownNameError: axes, windows or metrics that are none, or a cell that is no experiment.

    Example:
        >>> pair = Experiment(model="shapes-unet", source="a red circle", target="a blue circle",
        ...                   num_inference_steps=20)
        >>> sweep = Sweep(pair, {"site": ["unet.mid_block", "unet.up_blocks.2"], "step": range(20)})
        >>> sweep.run(folder="red-to-blue").towards_mean.plot()
    """

    def __init__(
        self,
        experiment: Experiment,
        axes: Mapping[str, Iterable[Any]],
        *,
        cell: Callable[[dict[str, Any]], Experiment] | None = None,
        window: str = "1",
        branch: str = "cond",
        metrics: Sequence[str | RunMetric | Callable[[Record, Record, Record], float]] = (
            "towards",
            "difference",
        ),
        corrupt: Sequence[Corrupt] = (),
        controls: bool = True,
        rows: int = ROWS,
    ) -> None:
        if experiment.num_inference_steps is None:
            raise InputError(
                "A sweep says how many steps its runs have: Experiment(num_inference_steps=20, …)."
            )
        if isinstance(metrics, (str, RunMetric)) or not metrics:
            raise InputError(f"metrics={metrics!r} is no list of metrics, such as ['towards'].")
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise InputError(f"rows={rows!r} is no number of cells to compute at once. Give at least 1.")
        self.experiment = experiment
        self.axes = {name: _axis(name, values) for name, values in axes.items()}
        self.axes.setdefault("seed", tuple(range(experiment.seed, experiment.seed + SEEDS)))
        self.window, self.branch = window, branch
        if cell is None:
            check_axes(self.axes, window=window, branch=branch, own=bool(experiment.interventions))
            if "step" in self.axes:
                steps = [step_of(each, experiment.num_inference_steps) for each in self.axes["step"]]
                self.axes["step"] = _axis("step", steps)
        self.metrics = tuple(run_metric(each) for each in metrics)
        self.corrupt = tuple(corrupt)
        self.corrupting = tuple(CorruptSpec.of(each, experiment.num_inference_steps) for each in corrupt)
        self.controls = controls
        self.cell = cell
        self.rows = rows
        names = [each.name for each in self.metrics]
        if len(set(names)) < len(names):
            raise InputError(
                f"Two metrics are called alike: {', '.join(names)}. Rename one: wb.RunMetric(name, metric)."
            )
        if both := set(names) & set(self.axes):
            raise InputError(
                f"A metric and an axis are both called {', '.join(sorted(both))}. Rename the metric: "
                "wb.RunMetric(name, metric)."
            )
        self.points = [dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]
        self.cells = [self._checked(point, cell or self._patched) for point in self.points]

    @cached_property
    def definition(self) -> dict[str, Any]:
        """Everything that the values depend on, as data: the hash of it is the sweep's own."""
        cells = hashlib.sha256()
        for each in self.cells:
            cells.update(each.model_dump_json(exclude=_unsaid(each)).encode() + b"\n")
        return {
            "experiment": self.experiment.model_dump(mode="json", exclude=_unsaid(self.experiment)),
            "axes": {name: [_plain(value) for value in values] for name, values in self.axes.items()},
            "cells": cells.hexdigest(),
            "window": self.window,
            "branch": self.branch,
            "metrics": {each.name: each.definition for each in self.metrics},
            "corrupt": [each.model_dump(mode="json") for each in self.corrupting],
            "controls": self.controls,
            "plan": PLAN,
            "rows": self.rows,
        }

    @cached_property
    def key(self) -> str:
        """The hash of the definition."""
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()

    def run(
        self,
        model: DiffusionModel | None = None,
        folder: str | Path | None = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        listener: Listener | None = None,
        allow_code: bool = False,
        retry: bool = False,
    ) -> xarray.Dataset:
        """Run every cell that a folder does not hold yet, and return what was measured.

        A cell whose experiment is refused, or whose metric raises, has its error in place of values; the
        others are run.

        Args:
            model: an open model; None opens the one the experiment names.
            folder: where results are kept, a batch of cells at a time, each brought to the disk before it
                counts: whenever a sweep dies, the next run goes on from there. None keeps nothing.
            progress: told after each batch; an exception it raises ends the sweep, as Stop does.
            listener: told of each call and tick; likewise.
            allow_code: whether to import what cells name as modules of one's own, which may run anything.
            retry: whether what the folder holds as failed is run again, with the cells of its batch: after
                the weights of a metric are there, say.

        Returns:
            An ``xarray.Dataset`` over the axes. For a metric ``towards``: ``towards`` of each cell;
            ``towards_mean`` over the seeds, and ``towards_low`` to ``towards_high``, its 95% confidence
            interval (Student's t over seeds, NaN of fewer than two); ``towards_random`` of a change as large
            as each cell's patch in a random direction, beside whatever else the cell changes; and by pair of
            runs ``towards_floor``, what another seed alone does, and ``towards_identity``, every patch with
            what the target's own run has in that place, which is 0 if all is right. Cells without patches
            have neither a random direction nor an identity: NaN, and where no cell has one, no variable.
            ``error`` says why a cell has no value, and ``error_random``, ``error_floor`` and
            ``error_identity`` why a control has none; they are there if anything failed.

        Raises:
            StoreError: the folder holds another sweep, or something else.
            BusyError: another process fills it now.
            UnknownNameError: the model has no such site.
        """
        need_xarray()
        told = {"progress": progress, "listener": listener, "allow_code": allow_code, "retry": retry}
        return dataset(self, self.measure(model, folder, **told))  # type: ignore[arg-type]

    def measure(
        self,
        model: DiffusionModel | None = None,
        folder: str | Path | None = None,
        *,
        progress: Callable[[Progress], None] | None = None,
        listener: Listener | None = None,
        allow_code: bool = False,
        retry: bool = False,
    ) -> list[Result]:
        """Do what `run` does and return the results as they are committed, for which no xarray is needed."""
        model = self._opened(model)
        told = {"progress": progress, "listener": listener, "allow_code": allow_code, "retry": retry}
        sweeper = Sweeper(self, model, **told)  # type: ignore[arg-type]
        with sampling(model, self.experiment.scheduler):
            if folder is None:
                return sweeper.run(None)
            with SweepStore(folder, self.key, self.definition).opened() as store:
                return sweeper.run(store)

    def load(self, folder: str | Path) -> xarray.Dataset:
        """Return what a folder holds of this sweep; cells that are not there are NaN.

        Raises:
            StoreError: it holds another sweep, or none.
        """
        need_xarray()
        found = SweepStore(folder, self.key, self.definition).read()
        return dataset(self, [result for batch in found.values() for result in batch.results])

    def point_of(self, result: Result) -> dict[str, Any]:
        """Return the values of the axes that a result is of."""
        return self.points[result.cell]

    def at(self, **labels: Any) -> Experiment:
        """Return the experiment of one point.

        Args:
            **labels: a value of each axis; of an axis with one value it can be left out.

        Raises:
            UnknownNameError: no such axis or value.
        """
        return self.cells[self._index(labels)]

    def run_at(
        self, model: DiffusionModel | None = None, *, allow_code: bool = False, **labels: Any
    ) -> Record:
        """Run one cell by itself: exactly what its experiment gives, with its picture.

        Args:
            model: an open model; None opens the one the experiment names.
            allow_code: as in `run`.
            **labels: as in `at`.
        """
        index = self._index(labels)
        model = self._opened(model)
        with sampling(model, self.experiment.scheduler):
            return Sweeper(self, model, allow_code=allow_code).alone(index)

    def beside(self, steps: int) -> int:
        """Return how many of a cell's acting changes, the first, stand beside what is swept in every cell."""
        swept_alone = self.cell is not None or "site" not in self.axes
        return 0 if swept_alone else len(self.experiment.acting(steps))

    def changes_of(
        self, index: int, source: Record, target: Record, *, runs: Runs | None = None
    ) -> list[Intervention]:
        """Return what a cell changes, bound to its runs; ``runs`` as in `Experiment.bound`."""
        return self.cells[index].bound(source, target, runs=runs)

    def export(
        self,
        path: str | Path,
        format: str = "standalone",
        model: DiffusionModel | None = None,
        *,
        allow_code: bool = False,
    ) -> Path:
        """Write the sweep as a script, ``.py``, or a notebook, ``.ipynb``.

        `Experiment.load` reads the experiment of all cells from it, with the names of axes in its prompts.

        Args:
            path: where to.
            format: ``"standalone"``, on diffusers and torch alone: it runs each cell by itself, saves its
                image and a table; or ``"workbench"``: this sweep with its controls.
            model: an open model; None opens the one the experiment names, if a standalone script needs it.
            allow_code: whether the script may import what cells name as modules of one's own.

        Raises:
            InputError: a script cannot do what the sweep does; the message says what.
            UnknownNameError: no such format.
        """
        from workbench.experiments import sweepcode
        from workbench.experiments.exporting import as_file, write

        if format not in ("standalone", "workbench"):
            raise UnknownNameError(f"No format {format!r}.{nearest(format, ('standalone', 'workbench'))}")
        if format == "standalone":
            code = sweepcode.standalone_sweep_code(self, model, allow_code=allow_code)
        else:
            code = sweepcode.workbench_sweep_code(self, model)
        return write(as_file(code, Path(path).suffix, self.experiment), path)

    def _opened(self, model: DiffusionModel | None) -> DiffusionModel:
        opened = self.experiment.open() if model is None else model
        self.experiment.check_weights(opened)
        return opened

    def _checked(self, point: dict[str, Any], cell: Callable[[dict[str, Any]], Experiment]) -> Experiment:
        made = cell(dict(point))
        if not isinstance(made, Experiment):
            raise InputError(f"The cell of {point} is {type(made).__name__}, not an Experiment.")
        if made.model_copy(update={"num_inference_steps": None}).model != self.experiment.model:
            raise InputError(f"The cell of {point} is of another model: {made.model!r}. A sweep has one.")
        if made.scheduler != self.experiment.scheduler:
            raise InputError(f"The cell of {point} has another scheduler. A sweep has one.")
        if made.forks or made.source_model or any(isinstance(each, TurnSpec) for each in made.interventions):
            raise InputError(
                f"The cell of {point} has turns, branches or a source of another model, which no row of a "
                "sweep can have: run it by itself, experiment.run()."
            )
        if made.picture is not None:
            raise InputError(
                "A sweep tells what a seed did from what a patch did, and the noise of a picture has no "
                "seed: run the experiment of a picture by itself, experiment.run()."
            )
        if made.num_inference_steps != self.experiment.num_inference_steps:
            raise InputError(f"The cell of {point} has other steps. A sweep's runs all have as many.")
        return made

    def _patched(self, point: dict[str, Any]) -> Experiment:
        return cell_of(self.experiment, point, window=self.window, branch=self.branch)

    def _index(self, labels: Mapping[str, Any]) -> int:
        for name in labels:
            if name not in self.axes:
                raise UnknownNameError(f"The sweep has no axis {name!r}.{nearest(name, self.axes)}")
        index = 0
        for name, values in self.axes.items():
            if name not in labels and len(values) > 1:
                raise InputError(f"Say which {name}: one of {', '.join(map(str, values[:8]))}.")
            value = _hashable(labels.get(name, values[0]))
            if name == "step" and self.cell is None and value not in values:
                value = step_of(value, self.experiment.num_inference_steps or 0)
            if value not in values:
                known = [str(each) for each in values]
                raise UnknownNameError(f"The axis {name} has no {value!r}.{nearest(str(value), known)}")
            index = index * len(values) + values.index(value)
        return index

    def __repr__(self) -> str:
        shape = " × ".join(f"{len(values)} {name}" for name, values in self.axes.items())
        return f"Sweep({shape}: {len(self.cells)} cells)"


def _axis(name: str, values: Iterable[Any]) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputError(f"The axis {name} takes a list of values, not {values!r}.")
    found = tuple(_hashable(each) for each in values)
    if not found:
        raise InputError(f"The axis {name} has no values.")
    if len({label(each) for each in found}) < len(found):
        raise InputError(f"The axis {name} has a value twice: {', '.join(map(label, found))}.")
    return found


def _hashable(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple, range)) else value


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool)) else label(value)


def _unsaid(experiment: Experiment) -> set[str]:
    """Return fields that are left out of the hash of a sweep where they say nothing: older ones had none."""
    return {name for name in ("scheduler", "source_weights") if getattr(experiment, name) is None}
