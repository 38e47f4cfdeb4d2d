"""A sweep's results as a labelled array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import InputError
from workbench.experiments.statistics import mean_interval
from workbench.experiments.sweepplan import CELL, FLOOR, IDENTITY, RANDOM, pairs_of
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
    variables: dict[str, Any] = {}
    for metric in (each.name for each in sweep.metrics):
        cells = _filled(sweep, results, metric, CELL).reshape(shape)
        variables[metric] = (names, cells)
        if "seed" in names:
            axis = names.index("seed")
            rest = tuple(name for name in names if name != "seed")
            ends = zip(("mean", "low", "high"), mean_interval(cells, axis), strict=True)
            variables |= {f"{metric}_{end}": (rest, values) for end, values in ends}
        if sweep.controls:
            variables[f"{metric}_{RANDOM}"] = (names, _filled(sweep, results, metric, RANDOM).reshape(shape))
            for kind in (IDENTITY, FLOOR):
                values = _filled(sweep, results, metric, kind).reshape(shape)
                some = values[tuple(slice(None) if name in of_pairs else 0 for name in names)]
                variables[f"{metric}_{kind}"] = (of_pairs, some)
    errors = {each.cell: each.error for each in results if each.kind == CELL and each.error is not None}
    if errors:
        told = np.array([errors.get(cell, "") for cell in range(len(sweep.cells))], dtype=object)
        variables["error"] = (names, told.reshape(shape))
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
    values = np.full(len(sweep.cells), np.nan)
    for each in results:
        value = each.values.get(metric)
        if each.kind == kind and value is not None:
            values[each.cell] = value
    if kind in (IDENTITY, FLOOR):
        pairs = np.array(pairs_of(sweep.cells))
        firsts = [int(np.argmax(pairs == pair)) for pair in range(pairs.max() + 1)]
        values = values[firsts][pairs]
    return values


def _axes_of_pairs(sweep: Sweep, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the axes along which cells have other runs."""
    pairs = np.array(pairs_of(sweep.cells)).reshape(shape)
    return tuple(
        name for axis, name in enumerate(sweep.axes) if not np.all(pairs == pairs.take([0], axis=axis))
    )
