"""What a sweep measures in which order: which cells go together, and from which runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.experiments.experiment import Experiment
from workbench.experiments.site_changes import PatchSpec
from workbench.experiments.together import evenly

if TYPE_CHECKING:
    from workbench.experiments.sweep import Sweep

CELL, RANDOM, IDENTITY, FLOOR = "cell", "random", "identity", "floor"

PLAN = 2
"""The version of the plan and its controls: a folder that was filled by another is not gone on with."""


@dataclass(frozen=True)
class Trial:
    """One thing to measure.

    Attributes:
        kind: the cell itself, its random direction, or its pair's identity or noise floor.
        cell: the cell's number; of a pair's controls, its first.
    """

    kind: str
    cell: int


@dataclass(frozen=True)
class Wave:
    """Pairs of runs that are held at once, and the batches that need them, each with its number."""

    pairs: tuple[int, ...]
    batches: tuple[tuple[int, tuple[Trial, ...]], ...]


def pairs_of(cells: Sequence[Experiment]) -> list[int]:
    """Return the pair of runs that each cell is of, numbered in order of appearance."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(each.plain().model_dump_json(), len(numbers)) for each in cells]


def plan(sweep: Sweep) -> list[Wave]:
    """Return what is measured in which order: by the sweep's definition alone, so that it can be resumed.

    Cells of one pair and first step go together, in stretches of the same sites at every step, so that few
    sites' activations are needed at a time; of small pairs several go together.
    """
    by_pair: dict[int, list[int]] = defaultdict(list)
    for cell, pair in enumerate(pairs_of(sweep.cells)):
        by_pair[pair].append(cell)
    steps = sweep.experiment.num_inference_steps
    assert steps is not None
    first = [each.first_step(steps) for each in sweep.cells]
    kinds = (CELL, RANDOM) if sweep.controls else (CELL,)
    beside = sweep.beside(steps)
    patched = {cell for cell, each in enumerate(sweep.cells) if _patches(each.acting(steps)[beside:])}
    waves, number = [], 0
    for pairs in _waves(by_pair, first, sweep.rows // len(kinds)):
        stretches: list[tuple[int, int, tuple[Trial, ...]]] = []
        by_step: dict[int, list[Trial]] = defaultdict(list)
        for cell in (cell for pair in pairs for cell in by_pair[pair]):
            by_step[first[cell]] += [Trial(kind, cell) for kind in kinds if kind == CELL or cell in patched]
        for step, trials in by_step.items():
            cut = evenly(trials, sweep.rows)
            stretches += [(place, step, tuple(batch)) for place, batch in enumerate(cut)]
        batches = [batch for *_, batch in sorted(stretches, key=lambda each: each[:2])]
        if sweep.controls:
            batches += [
                (Trial(kind, by_pair[pair][0]),)
                for pair in pairs
                for kind in (IDENTITY, FLOOR)
                if kind == FLOOR or any(_patches(sweep.cells[cell].acting(steps)) for cell in by_pair[pair])
            ]
        waves.append(Wave(tuple(pairs), tuple(enumerate(batches, number))))
        number += len(batches)
    return waves


def _patches(changes: Sequence[Any]) -> bool:
    return any(isinstance(each, PatchSpec) for each in changes)


def _waves(by_pair: dict[int, list[int]], first: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Give pairs, as many at a time as it takes to fill the rows of a batch."""
    most = 1
    for cells in by_pair.values():
        steps = [first[cell] for cell in cells]
        most = max(most, *(steps.count(step) for step in set(steps)))
    together = max(1, rows // most)
    pairs = list(by_pair)
    for start in range(0, len(pairs), together):
        yield pairs[start : start + together]
