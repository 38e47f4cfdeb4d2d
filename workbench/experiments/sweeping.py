"""How a sweep is run: from which runs its cells are made, and what is measured of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from workbench.errors import BusyError, InputError, RunStopped, WorkbenchError
from workbench.experiments.change import Runs
from workbench.experiments.experiment import Experiment
from workbench.experiments.kept import Kept
from workbench.experiments.site_changes import ModuleSpec, PatchSpec
from workbench.experiments.sweepplan import CELL, FLOOR, IDENTITY, RANDOM, Trial, pairs_of, plan
from workbench.experiments.sweepstore import Batch, Result, SweepStore
from workbench.experiments.together import fork_rows, goes_together
from workbench.interventions.control import RandomDirection
from workbench.interventions.intervention import Intervention
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.tracing.memory import free_memory
from workbench.tracing.record import Record
from workbench.tracing.session import Listener
from workbench.tracing.sites import Site, resolve

if TYPE_CHECKING:
    from workbench.experiments.sweep import Sweep

_SHARE_OF_MEMORY = 0.25
"""Of what is free: what the activations of a wave's source runs may take."""

_AHEAD = 64
"""How many batches ahead activations are captured along, where there is room."""

_SAME_PLACE = {"from_site": None, "from_step": None, "from_tokens": None, "from_words": None}
"""What a patch says that takes from the place it goes to."""


@dataclass(frozen=True)
class Progress:
    """How far a sweep is.

    Attributes:
        done: cells whose values are known, with those that were there before.
        total: all of them.
        failed: of the done, how many have an error in place of values.
    """

    done: int
    total: int
    failed: int


class Pair:
    """The source and the target run of some cells.

    Args:
        sweep: the sweep.
        experiment: both runs, without patches.
        model: what runs them.
        budget: bytes that activations of the source may take.
        listener: told how the runs go on.
    """

    def __init__(
        self,
        sweep: Sweep,
        experiment: Experiment,
        model: DiffusionModel,
        budget: int,
        listener: Listener | None,
    ) -> None:
        self.experiment = experiment
        self.own = list(sweep.corrupt)
        self.target = self._target(model, experiment.seed, listener)
        # What corrupts the target is not in a source that leaves the target's run, either.
        clean = self._target(model, experiment.seed, listener, plain=True) if self.own else self.target
        source = experiment.run_source(model, clean, listener=listener)
        self.source = Kept(source, experiment.source_from, budget, listener)
        self.itself = Kept(self.target, 0, budget, listener)
        self._runs: Runs | None = None

    def other(self, model: DiffusionModel, seed: int, listener: Listener | None) -> Record:
        """Return the target's run with another seed."""
        return self._target(model, seed, listener)

    def runs(self, allow_code: bool) -> Runs:
        """Return what the changes of all cells take from: runs of other prompts are made once."""
        if self._runs is None:
            self._runs = self.experiment.runs(self.source.record, self.target, allow_code=allow_code)
        return self._runs

    @cached_property
    def prints(self) -> tuple[float, ...]:
        """Some numbers of both runs, by which to know them again."""
        found = []
        for record in (self.source.record, self.target):
            latents = record.ticks[-1]["latents"]
            assert latents is not None
            latents = torch.nan_to_num(latents.double(), posinf=0.0, neginf=0.0)
            found += [float(latents.abs().mean()), *map(float, latents.flatten()[:4])]
        return tuple(found)

    def _target(
        self, model: DiffusionModel, seed: int, listener: Listener | None, *, plain: bool = False
    ) -> Record:
        return model.record(
            self.experiment.target,
            seed=seed,
            interventions=[] if plain else self.own,
            listener=listener,
            **self.experiment.settings(),
        )


class Sweeper:
    """Runs a sweep on a model.

    Args:
        sweep: what to run.
        model: the model.
        progress: told after each batch.
        listener: told how the runs go on.
        allow_code: whether cells may import modules of one's own.
        retry: whether batches in which something failed are measured anew.
    """

    def __init__(
        self,
        sweep: Sweep,
        model: DiffusionModel,
        *,
        progress: Callable[[Progress], None] | None = None,
        listener: Listener | None = None,
        allow_code: bool = False,
        retry: bool = False,
    ) -> None:
        self.sweep, self.model = sweep, model
        self._allow_code, self._retry = allow_code, retry
        self._progress, self._listener = progress, listener
        self._pair_of = pairs_of(sweep.cells)
        self._pairs: dict[int, Pair] = {}
        self._together: bool | None = None
        self._done = self._failed = 0
        self._refused: set[int] = set()
        self._pictures = any(each.pictures for each in sweep.metrics)

    def run(self, store: SweepStore | None) -> list[Result]:
        """Measure what a folder does not hold yet, and return everything.

        Raises:
            UnknownNameError: the model has no such site; nothing was run.
            InputError: a cell would import something that nobody said may be; likewise.
        """
        for site in dict.fromkeys(site for each in self.sweep.cells for site in each.captures()):
            resolve(self.model.components, Site.parse(site).path)
        for change in (change for each in self.sweep.cells for change in each.interventions):
            if isinstance(change, ModuleSpec):
                change.check_trusted(self._allow_code)
        done = {} if store is None else store.read()
        if self._retry:
            done = {
                number: batch
                for number, batch in done.items()
                if all(result.error is None for result in batch.results)
            }
        found: list[Result] = []
        self._note(found, [result for batch in done.values() for result in batch.results])
        for wave in plan(self.sweep):
            missing = [(number, trials) for number, trials in wave.batches if number not in done]
            if not missing:
                continue
            self._open(wave.pairs, store, [done[number] for number, _ in wave.batches if number in done])
            for place, (number, trials) in enumerate(missing):
                later = missing[place + 1 : place + 1 + _AHEAD]
                results = self._measured(trials, [trial.cell for _, each in later for trial in each])
                if store is not None:
                    prints = {self._pair_of[each.cell]: self._pair(each.cell).prints for each in trials}
                    key = self.sweep.key
                    store.commit(Batch(sweep=key, number=number, results=tuple(results), prints=prints))
                self._note(found, results)
        self._pairs.clear()
        return found

    def alone(self, cell: int) -> Record:
        """Run one cell by itself, with its picture."""
        self._pairs.setdefault(self._pair_of[cell], self._new_pair(self._pair_of[cell], 1))
        (record,) = self._run([Trial(CELL, cell)], [], pictures=True)
        return record

    def _open(self, pairs: Sequence[int], store: SweepStore | None, done: Sequence[Batch]) -> None:
        self._pairs.clear()
        known = {pair: prints for batch in done for pair, prints in batch.prints.items()}
        for pair in pairs:
            self._pairs[pair] = self._new_pair(pair, len(pairs))
            if store is not None and pair in known:
                store.check_prints(known[pair], self._pairs[pair].prints)

    def _new_pair(self, pair: int, beside: int) -> Pair:
        experiment = self.sweep.cells[self._pair_of.index(pair)].plain()
        budget = int(free_memory() * _SHARE_OF_MEMORY / (2 * beside))
        return Pair(self.sweep, experiment, self.model, budget, self._listener)

    def _pair(self, cell: int) -> Pair:
        return self._pairs[self._pair_of[cell]]

    def _measured(self, trials: Sequence[Trial], ahead: Sequence[int]) -> list[Result]:
        """Return what is measured of trials that go together; where one is refused, each by itself."""
        if len(trials) > 1 and not self._rows_are_runs(trials[0]):
            return [result for each in trials for result in self._measured([each], ahead)]
        try:
            records = self._run(trials, ahead, pictures=self._pictures)
        except (RunStopped, BusyError):
            raise
        except WorkbenchError as error:
            if len(trials) == 1:
                return [Result(kind=trials[0].kind, cell=trials[0].cell, error=str(error))]
            return [result for each in trials for result in self._measured([each], ahead)]
        return [self._result(each, record) for each, record in zip(trials, records, strict=True)]

    def _rows_are_runs(self, trial: Trial) -> bool:
        if self._together is None:
            self._together = goes_together(self._pair(trial.cell).target)
            if not self._together:
                warnings.warn(
                    "Rows of one run of this model are not what runs of their own are: each cell is run by "
                    "itself, which takes longer.",
                    stacklevel=2,
                )
        return self._together

    def _run(self, trials: Sequence[Trial], ahead: Sequence[int], *, pictures: bool) -> list[Record]:
        pair = self._pair(trials[0].cell)
        if trials[0].kind == FLOOR:
            return [pair.other(self.model, self._other_seed(pair), self._listener)]
        if trials[0].kind == IDENTITY:
            changes = [[*pair.own, *self._identity(pair, trials[0].cell)]]
            return fork_rows([pair.target], changes, 0, pictures=pictures, listener=self._listener)
        for each in {id(pair): pair for pair in (self._pair(trial.cell) for trial in trials)}.values():
            now, later = (
                [site for cell in cells if self._pair(cell) is each for site in self._sites(cell)]
                for cells in ([trial.cell for trial in trials], [cell for cell in ahead if self._held(cell)])
            )
            each.source.holding(now, later)
        targets = [self._pair(each.cell).target for each in trials]
        steps = targets[0].ledger.steps
        first = min(self.sweep.cells[each.cell].first_step(steps) for each in trials)
        changes = [self._changes(each) for each in trials]
        return fork_rows(targets, changes, first, pictures=pictures, listener=self._listener)

    def _changes(self, trial: Trial) -> list[Intervention]:
        pair = self._pair(trial.cell)
        runs = pair.runs(self._allow_code)
        changes = self.sweep.changes_of(trial.cell, pair.source.record, pair.target, runs=runs)
        if trial.kind == RANDOM:
            beside = self.sweep.beside(pair.target.ledger.steps)
            swept = [
                RandomDirection.of(each, seed=trial.cell) if isinstance(each, Patch) else each
                for each in changes[beside:]
            ]
            changes = [*changes[:beside], *swept]
        return [*pair.own, *changes]

    def _sites(self, cell: int) -> tuple[str, ...]:
        return self.sweep.cells[cell].captures()

    def _held(self, cell: int) -> bool:
        return self._pair_of[cell] in self._pairs

    def _identity(self, pair: Pair, first: int) -> list[Intervention]:
        """Return a pair's patches from the same place of the target's own run, of as many sites as fit.

        Raises:
            InputError: all its cells were refused, so that nothing could be wrong with any.
        """
        number, steps = self._pair_of[first], pair.target.ledger.steps
        patches = dict.fromkeys(
            each.model_copy(update=_SAME_PLACE)
            for cell, of in enumerate(self._pair_of)
            if of == number and cell not in self._refused
            for each in self.sweep.cells[cell].acting(steps)
            if isinstance(each, PatchSpec)
        )
        if not patches:
            raise InputError("Every cell with a patch was refused, and there is none to try.")
        sites = list(dict.fromkeys(each.site for each in patches))
        pair.itself.holding(sites[:1])
        held = pair.itself.holding(sites[: pair.itself.room])
        runs = pair.experiment.runs(held, pair.target)
        return [each.bind(runs) for each in patches if each.site in held.captured]

    def _other_seed(self, pair: Pair) -> int:
        """Return the next seed of the sweep, or the first that it has not."""
        own = pair.experiment.seed
        seeds: tuple[int, ...] = self.sweep.axes.get("seed", ())
        place = seeds.index(own) + 1 if own in seeds else 0
        others = [*seeds[place:], *seeds[:place], own + 1, own + 2]
        return next(seed for seed in others if seed not in (own, pair.experiment.source_seed))

    def _result(self, trial: Trial, record: Record) -> Result:
        pair = self._pair(trial.cell)
        values: dict[str, float | None] = {}
        wrong = []
        for each in self.sweep.metrics:
            try:
                value = float(each.of(record, pair.source.record, pair.target))
            except (RunStopped, BusyError):
                raise
            except Exception as error:  # noqa: BLE001 (a metric may be anyone's function)
                wrong.append(f"{each.name} ended with {type(error).__name__}: {error}")
                value = math.nan
            else:
                wrong += [f"{each.name} is not a number"] if math.isnan(value) else []
            values[each.name] = None if math.isnan(value) else value
        return Result(kind=trial.kind, cell=trial.cell, values=values, error="; ".join(wrong) or None)

    def _note(self, found: list[Result], results: Sequence[Result]) -> None:
        """Add results to those that were found, and tell how far the sweep is."""
        found += results
        cells = [each for each in results if each.kind == CELL]
        self._done += len(cells)
        failed = {each.cell for each in cells if each.error is not None}
        self._refused |= failed
        self._failed += len(failed)
        if self._progress is not None:
            self._progress(Progress(self._done, len(self.sweep.cells), self._failed))
