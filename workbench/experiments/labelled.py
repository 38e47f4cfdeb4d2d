"""A sweep's results as a labelled array."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import InputError
from workbench.experiments.statistics import mean_interval
from workbench.experiments.sweepplan import CELL, FLOOR, IDENTITY, RANDOM, pairs_of, plan
from workbench.experiments.sweepstore import Result

if TYPE_CHECKING:
    import xarray

    from workbench.experiments.sweep import Sweep


def need_xarray() -> Any:
    """Return the module ``xarray``, which comes with an extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise InputError(
            "A sweep gives a labelled array, and xarray is not installed: "
            "pip install 'diffusion-workbench[experiments]'."
        ) from error
    return xarray


def dataset(sweep: Sweep, results: Sequence[Result]) -> xarray.Dataset:
    """Return what was measured, over the sweep's axes; see `Sweep.run` for what is in it."""
    xr = need_xarray()
    names = tuple(sweep.axes)
    shape = tuple(len(values) for values in sweep.axes.values())
    of_pairs = _axes_of_pairs(sweep, shape)
    first = tuple(slice(None) if name in of_pairs else 0 for name in names)
    controls = dict.fromkeys(
        trial.kind
        for wave in plan(sweep)
        for _, trials in wave.batches
        for trial in trials
        if trial.kind != CELL
    )
    variables: dict[str, Any] = {}
    for metric in (each.name for each in sweep.metrics):
        cells = _filled(sweep, results, metric, CELL).reshape(shape)
        variables[metric] = (names, cells)
        if "seed" in names:
            axis = names.index("seed")
            rest = tuple(name for name in names if name != "seed")
            ends = zip(("mean", "low", "high"), mean_interval(cells, axis), strict=True)
            variables |= {f"{metric}_{end}": (rest, values) for end, values in ends}
        for kind in controls:
            values = _filled(sweep, results, metric, kind).reshape(shape)
            variables[f"{metric}_{kind}"] = (names, values) if kind == RANDOM else (of_pairs, values[first])
    for kind in (CELL, *controls):
        errors = _spread(sweep, {each.cell: each.error for each in results if each.kind == kind}, kind)
        if any(errors):
            told = np.array([each or "" for each in errors], dtype=object).reshape(shape)
            of_cells = kind in (CELL, RANDOM)
            name = "error" if kind == CELL else f"error_{kind}"
            variables[name] = (names, told) if of_cells else (of_pairs, told[first])
    coordinates = {
        name: [value if isinstance(value, (str, int, float)) else label(value) for value in values]
        for name, values in sweep.axes.items()
    }
    about = {
        "sweep": sweep.key,
        "interval": "95%, Student's t of the mean over seeds",
        "window": sweep.window,
        "rows": sweep.rows,
    }
    return xr.Dataset(variables, coordinates, about)


def label(value: Any) -> str:
    """Spell a value of an axis."""
    return " + ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _filled(sweep: Sweep, results: Sequence[Result], metric: str, kind: str) -> np.ndarray:
    """Return one kind of results by cell, ``(cells,)``, float64; those of a pair at each of its cells."""
    found = {each.cell: each.values.get(metric) for each in results if each.kind == kind}
    return np.array([np.nan if each is None else each for each in _spread(sweep, found, kind)])


def _spread(sweep: Sweep, found: Mapping[int, Any], kind: str) -> list[Any]:
    """Return what was found by cell; what is of a pair, under its first, at each of the pair's cells."""
    if kind not in (IDENTITY, FLOOR):
        return [found.get(cell) for cell in range(len(sweep.cells))]
    firsts: dict[int, int] = {}
    pairs = pairs_of(sweep.cells)
    return [found.get(firsts.setdefault(pair, cell)) for cell, pair in enumerate(pairs)]


def _axes_of_pairs(sweep: Sweep, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the axes along which cells have other runs."""
    pairs = np.array(pairs_of(sweep.cells)).reshape(shape)
    return tuple(
        name for axis, name in enumerate(sweep.axes) if not np.all(pairs == pairs.take([0], axis=axis))
    )
