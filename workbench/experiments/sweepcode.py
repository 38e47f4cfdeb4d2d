"""A sweep as a script, on the workbench or on diffusers and torch alone."""

from __future__ import annotations

from typing import Any

from workbench.errors import InputError
from workbench.experiments import machine
from workbench.experiments.branching import rerun
from workbench.experiments.change import LayerChange, SiteChange
from workbench.experiments.experiment import Experiment
from workbench.experiments.labelled import label
from workbench.experiments.planned import Planner
from workbench.experiments.sampler import sampling
from workbench.experiments.scripts import Code, literal, opening_lines, said
from workbench.experiments.site_changes import CorruptSpec
from workbench.experiments.standalone import (
    add_all,
    data_code,
    head_code,
    machine_code,
    opening_code,
    runs_of,
    shared_code,
)
from workbench.experiments.surveying import Survey
from workbench.experiments.sweep import Sweep
from workbench.experiments.sweepplan import pairs_of
from workbench.models.model import DiffusionModel


def workbench_sweep_code(sweep: Sweep, model: DiffusionModel | None = None) -> str:
    """Return a sweep as Python against the workbench.

    Args:
        sweep: what to write.
        model: the model it is of, if that is open: the script opens it as it is open here.

    Raises:
        InputError: its cells or metrics are functions, which a script has not.
    """
    named = [Code(each.code) for each in sweep.metrics if each.code is not None]
    if sweep.cell is not None or len(named) < len(sweep.metrics):
        raise InputError(
            "A script of a sweep has no functions of yours, neither cell= nor metrics: take those that have "
            "names, and patches. A standalone script writes out what cell= made."
        )
    settings = {
        "window": sweep.window,
        "branch": sweep.branch,
        "metrics": named,
        "corrupt": [_corrupt(each) for each in sweep.corrupting],
        "controls": sweep.controls,
        "rows": sweep.rows,
    }
    fields = [f"    {name}={literal(value, 4)}," for name, value in said(sweep.experiment).items()]
    opening = opening_lines(sweep.experiment, model)
    masked = any(each.mask is not None for each in sweep.corrupting) and "import torch" not in opening
    lines = [
        *(["import torch", ""] if masked else []),
        "import workbench as wb",
        "",
        *opening,
        "experiment = wb.Experiment(",
        *fields,
        ")",
        "sweep = wb.Sweep(",
        "    experiment,",
        f"    {literal({name: [*map(_value, values)] for name, values in sweep.axes.items()}, 4)},",
        *(f"    {name}={literal(value, 4)}," for name, value in settings.items()),
        ")",
        f'found = sweep.run({"model, " if opening else ""}folder="sweep")',
        'found.to_dataframe().to_csv("sweep.csv")',
    ]
    return "\n".join(lines) + "\n"


def standalone_sweep_code(
    sweep: Sweep, model: DiffusionModel | None = None, *, allow_code: bool = False
) -> str:
    """Return a sweep as a script that needs diffusers and torch alone.

    Each cell is a run of its own, whose image the script saves, beside a table of what is measured of it. Of
    controls it has none.

    Args:
        sweep: what to write.
        model: the model it is of; None opens the one the experiment names.
        allow_code: whether the script may import what cells name as modules of one's own.

    Raises:
        InputError: the model was built in memory, something is changed that plain hooks do not reach, or a
            metric is asked for that takes more than a few lines.
    """
    measured = _measured(sweep)
    if any(cell.settings() != sweep.experiment.settings() for cell in sweep.cells):
        raise InputError(
            "The cells of a standalone script have one guidance and the same arguments. Export the sweep on "
            "the workbench, or one sweep for each."
        )
    opened = sweep.experiment.open() if model is None else model
    sweep.experiment.check_weights(opened)
    with sampling(opened, sweep.experiment.scheduler):
        return _standalone(sweep, opened, measured, allow_code)


def _standalone(sweep: Sweep, opened: DiffusionModel, measured: list[str], allow_code: bool) -> str:
    """Return the script of a sweep on a model that has its scheduler."""
    changes: list[dict[str, Any]] = []
    cells: list[tuple[Any, ...]] = []
    pairs: dict[int, dict[str, Any]] = {}
    planners: dict[tuple[str | None, str | None], Planner] = {}
    corrupting: list[int] = []
    for point, cell, pair in zip(sweep.points, sweep.cells, pairs_of(sweep.cells), strict=True):
        told = (cell.source, cell.target)
        if told not in planners:
            planner = planners[told] = _planner(sweep, told, opened, allow_code)
            corrupting = add_all(changes, planner.planned(sweep.corrupting, [], planner.target))
        planner = planners[told]
        planner.experiment = cell
        found = planner.planned(*_acting(cell, planner), planner.target)
        cells.append((tuple(label(value) for value in point.values()), pair, add_all(changes, found)))
        source, target = runs_of(cell)
        made = pairs.setdefault(pair, {"source": source, "target": target, "further": []})
        if cell.source_from:
            made["leaves"] = planner.target.ledger.at(cell.source_from)[0].tick
        runs = dict.fromkeys(run for change in found for run in change.get("runs", ()) if run != "source")
        made["further"] += [run for run in runs if run not in made["further"]]
    denoisers = {each for planner in planners.values() for each in planner.denoisers}
    parts = [
        head_code(changes, "csv", "pathlib"),
        "\n".join(shared_code(sweep.experiment)),
        f"AXES = {list(sweep.axes)!r}",
        f"PAIRS = {literal(list(pairs.values()))}",
        "# Changes of every target, which its cells keep.",
        f"CORRUPT = {corrupting!r}",
        "# Each cell: its place on the axes, its pair of runs, and its changes.",
        f"CELLS = {literal(cells)}",
        data_code(changes, denoisers),
        machine.MANY_IMAGES,
        opening_code(opened),
        *machine_code(changes),
        machine.PIXELS,
        *measured,
        machine.SWEEP,
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _measured(sweep: Sweep) -> list[str]:
    """Return the functions that measure a cell's picture, and which pictures each is given.

    Raises:
        InputError: there is none for a metric.
    """
    found = {each.name: each.pictured for each in sweep.metrics}
    named = {"pixel": "difference", **{name: name for name in machine.MEASURES}}
    if foreign := [name for name, known in found.items() if known is None or known[0] not in named]:
        raise InputError(
            f"A standalone script does not compute {', '.join(foreign)}: with metrics= choose among "
            f"{', '.join(map(repr, machine.MEASURES))}, or export the sweep on the workbench."
        )
    used = {name: (named[known[0]], known[1]) for name, known in found.items() if known is not None}
    functions = dict.fromkeys(name for name, _ in used.values())
    lines = [f"    {name!r}: ({of}, {', '.join(map(repr, needs))})," for name, (of, needs) in used.items()]
    return [*(machine.MEASURES[name] for name in functions), "\n".join(["MEASURED = {", *lines, "}"])]


def _planner(
    sweep: Sweep, told: tuple[str | None, str | None], model: DiffusionModel, allow: bool
) -> Planner:
    """Return what plans the cells with these prompts: runs of other seeds have the same calls."""
    cell = next(each for each in sweep.cells if (each.source, each.target) == told)
    target = cell.run_target(model)
    return Planner(cell, cell.run_source(model, target), target, allow)


def _acting(cell: Experiment, planner: Planner) -> tuple[list[SiteChange], list[Survey]]:
    """Return what a cell changes: at sites, and in attention, looked at in a run."""
    acting = cell.acting(planner.steps)
    surveys = [Survey.of(each) for each in acting if isinstance(each, LayerChange)]
    if surveys:
        rerun(planner.target, surveys, cell.runs(planner.source, planner.target))
    return [each for each in acting if isinstance(each, SiteChange)], surveys


def _corrupt(spec: CorruptSpec) -> Code:
    """Return what corrupts a target as code."""
    told = {name: value for name, value in said(spec).items() if name != "kind"}
    if spec.mask is not None:
        told["mask"] = Code(f"torch.tensor({spec.mask!r})")
    return Code(f"wb.Corrupt({', '.join(f'{name}={value!r}' for name, value in told.items())})")


def _value(value: Any) -> Any:
    """Return a point of an axis as data."""
    if isinstance(value, tuple):
        return tuple(_value(each) for each in value)
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)
