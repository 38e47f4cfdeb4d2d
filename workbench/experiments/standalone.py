"""An experiment as a script that needs diffusers and torch alone.

Everything a user typed enters a script through ``repr``, so that a prompt stays a string whatever it holds.
The script says its changes as data; the machine that makes them is the same in every script, less what that
one does not need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from workbench import zoo
from workbench.errors import InputError
from workbench.experiments import machine
from workbench.experiments.branching import Fork, rerun
from workbench.experiments.changes import LayerChange, Runs, SiteChange, TurnSpec
from workbench.experiments.experiment import Experiment
from workbench.experiments.planned import ELSE, Planner
from workbench.experiments.scripts import Code, literal
from workbench.experiments.surveying import Survey
from workbench.tracing.guards import KERNEL_PORTS
from workbench.tracing.record import Record


def standalone_code(
    experiment: Experiment, source: Record, target: Record, *, allow_code: bool = False
) -> str:
    """Return the experiment as a script that needs diffusers and torch alone.

    The script saves the changed run's image, and beside it that of each branch. Where attention weights are
    edited, the target runs once more, so that words and layers can be written as numbers.

    Args:
        experiment: what to run.
        source: its source's run, whose ledger says which calls are which.
        target: its target's run.
        allow_code: whether the script may import what the experiment names as modules of one's own.

    Raises:
        InputError: the model was built in memory, so a script cannot open it; something is changed that
            plain hooks on modules do not reach; or it imports something without being allowed to.
    """
    if experiment.picture is not None:
        raise InputError(f"A standalone script finds no noise for a picture. {ELSE}")
    if experiment.acting(target.ledger.steps) or experiment.forks:
        parts = _Plan(experiment, source, target, allow_code).parts()
    else:
        parts = [head_code(), constants_code(experiment), machine.ONE_IMAGE, machine.OPEN, machine.PLAIN]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


@dataclass(frozen=True)
class _Branch:
    """One of the script's runs: the name it goes by, what it changes, and what it tells the pipeline.

    Attributes:
        name: the variable that holds it.
        sites: the changes at sites.
        surveys: of the edits of attention.
        told: arguments of the pipeline that are its own.
        run: with these arguments and surveys, but without the changes: it has the same calls.
    """

    name: str
    sites: tuple[SiteChange, ...]
    surveys: tuple[Survey, ...]
    told: Mapping[str, Any]
    run: Record

    def joined(self, acting: Sequence[Any], runs: Runs, step: int | None = None) -> _Branch:
        """Return the run with more that acts in it, from a step on."""
        surveys = tuple(Survey.of(each) for each in acting if isinstance(each, LayerChange))
        sites = tuple(each for each in acting if isinstance(each, SiteChange))
        run, before = self.run, self.run.spec.interventions
        if surveys or step is not None:
            run = rerun(run, surveys, runs, before, start=step)
        return replace(self, sites=(*self.sites, *sites), surveys=(*self.surveys, *surveys), run=run)

    def turned(self, turn: TurnSpec, runs: Runs) -> _Branch:
        """Return the run with other arguments from a step on."""
        run = rerun(self.run, [turn], runs, self.run.spec.interventions, start=turn.step)
        return replace(self, told={**self.told, **turn.changes()}, run=run)


class _Plan:
    """What a script does, call by call."""

    def __init__(self, experiment: Experiment, source: Record, target: Record, allow_code: bool) -> None:
        self.experiment = experiment
        self.source = source
        self.target = target
        self.steps = target.ledger.steps
        self._planner = Planner(experiment, source, target, allow_code)
        self.changes: list[dict[str, Any]] = []
        self._parted = bool(experiment.forks or _turns(experiment.interventions))
        self._runs = experiment.runs(source, target, allow_code=allow_code)
        self._lines = self._stem()

    def parts(self) -> list[str]:
        """Return the script, part by part."""
        branches = bool(self.experiment.forks)
        running = [*self._before(), *self._lines]
        head = head_code(self.changes, *(["pathlib"] if branches else []))
        own = [machine.ONE_IMAGE, machine.OPEN, *([machine.BRANCHES] if branches else [])]
        constants = [constants_code(self.experiment), data_code(self.changes, self._planner.denoisers)]
        return [head, *constants, *own, *machine_code(self.changes), "\n".join(running)]

    # The runs, in order.

    def _stem(self) -> list[str]:
        acting = self.experiment.acting(self.steps)
        branch = _Branch("changed", (), (), {}, self.target).joined(acting, self._runs)
        lines = [self._running(branch)]
        for turn in _turns(acting):
            branch = branch.turned(turn, self._runs)
            lines.append(self._running(branch, (branch.name, turn.step)))
        lines.append("changed.image.save(options.out)")
        return lines + self._branches(self.experiment.forks, branch)

    def _branches(self, forks: Sequence[Fork], stem: _Branch) -> list[str]:
        lines = []
        for number, fork in enumerate(forks):
            acting = fork.acting(self.steps)
            name = f"{'branch' if stem.name == 'changed' else stem.name}_{number}"
            branch = replace(stem, name=name).joined(acting, self._runs, fork.step)
            left, turns = (stem.name, fork.step), _turns(acting)
            if not turns or turns[0].step > fork.step:
                lines.append(self._running(branch, left))
                left = (name, fork.step)
            for turn in turns:
                branch = branch.turned(turn, self._runs)
                lines.append(self._running(branch, (left[0], turn.step)))
                left = (name, turn.step)
            lines.append(f"{name}.image.save(beside({name.replace('_', '-')!r}))")
            lines += self._branches(fork.forks, branch)
        return lines

    def _running(self, branch: _Branch, after: tuple[str, int] | None = None) -> str:
        """Return the line of one run."""
        words = {name: value for name, value in branch.told.items() if name == "prompt"}
        rest = {name: value for name, value in branch.told.items() if name != "prompt"}
        chosen = self._chosen(branch)
        arguments = [
            f"{{**TARGET, **{words!r}}}" if words else "TARGET",
            *([f"{{**SETTINGS, **{rest!r}}}"] if rest else []),
            *([f"changes={chosen}"] if chosen else []),
            *([f"after={self._after(*after)}"] if after else []),
        ]
        return f"{branch.name} = run({', '.join(arguments)})"

    def _before(self) -> list[str]:
        """Return the runs that are taken from."""
        lines: list[str] = []
        leaving = self.experiment.source_from
        for run in dict.fromkeys(run for change in self.changes for run in change.get("runs", ())):
            if run != "source":
                name = {"prompt": run[1], "seed": self.experiment.seed}
                lines.append(f"run({name!r}, keeps={run!r})")
            elif leaving:
                self._check_alike(leaving)
                lines.append("target = run(TARGET)  # the source leaves it")
                lines.append(f"run(SOURCE, keeps='source', after={self._after('target', leaving)})")
            elif self.experiment.source_model is not None:
                other = model_code(self.experiment.source_model)
                lines.append(f"other = DiffusionPipeline.from_pretrained({other})")
                lines.append("run(SOURCE, keeps='source', pipeline=other)")
            else:
                lines.append("run(SOURCE, keeps='source')")
        return lines

    def _after(self, name: str, step: int) -> str:
        """Return a run, and how many calls of its scheduler come before a step."""
        if step >= self.steps:
            raise InputError(f"The runs have {self.steps} steps; a turn at {step} is in none of them.")
        return f"({name}, {self.target.ledger.at(step)[0].tick})"

    def _chosen(self, branch: _Branch) -> str:
        """Return the changes of a run as code."""
        found = self._planner.planned(branch.sites, branch.surveys, branch.run)
        numbers = add_all(self.changes, found)
        if not numbers:
            return ""
        if numbers == list(range(len(numbers))) and not self._parted:
            return "CHANGES"
        return f"[{', '.join(f'CHANGES[{number}]' for number in numbers)}]"

    def _check_alike(self, leaving: int) -> None:
        for row in self.target.ledger:
            if row.step < leaving and row.branches != self.source.ledger[row.call].branches:
                raise InputError(
                    "The source and the target do not call the denoiser alike, so a script cannot make the "
                    f"one from the other. {ELSE}"
                )


def _turns(acting: Sequence[Any]) -> list[TurnSpec]:
    return [each for each in acting if isinstance(each, TurnSpec)]


def add_all(known: list[dict[str, Any]], changes: Sequence[dict[str, Any]]) -> list[int]:
    """Return the numbers of changes in a script, which says each once; those that are new join it."""
    for each in changes:
        if each not in known:
            known.append(each)
    return [known.index(each) for each in changes]


def data_code(changes: Sequence[dict[str, Any]], denoisers: Iterable[str]) -> str:
    """Return the changes of a script as code."""
    lines = [
        "# Each change: what to do at which places (module, port, which tensor, heads), in which of the",
        "# denoiser's or the scheduler's calls, to which rows of the batch, as (branch, of branches).",
        f"CHANGES = {literal(list(changes))}",
        f"DENOISERS = {sorted(denoisers)!r}",
    ]
    return "\n".join(lines)


def machine_code(changes: Sequence[dict[str, Any]]) -> list[str]:
    """Return what makes the changes, part by part: only what they need."""
    kinds = list(dict.fromkeys(each["do"] for each in changes))
    values = [kind for kind in kinds if kind in machine.KINDS]
    edits = [kind for kind in kinds if kind in machine.EDIT_KINDS]
    ports = {place[1] for each in changes for place in (*each["at"], *each.get("from", ()))}
    parts = [machine.MACHINE]
    if any("mask" in each or each["do"] == "force_map" for each in changes):
        parts.append(machine.MASK)
    if {"patch", "mean"} & set(values):
        parts.append(machine.TAKEN)
    parts += [machine.KINDS[kind] for kind in values]
    if ports & {"kernel", *KERNEL_PORTS}:
        parts.append(machine.ATTENTION)
    if edits:
        parts += [machine.EDITING, *(machine.EDIT_KINDS[kind] for kind in edits)]
    if values:
        parts.append(f"DO = {literal({kind: Code(machine.FUNCTIONS[kind]) for kind in values})}")
    return parts


def head_code(changes: Sequence[dict[str, Any]] | None = None, *further: str) -> str:
    """Return how a script begins: what it is, and what it imports for its changes and besides."""
    own = ["argparse", *further, *([] if changes is None else ["contextlib", "functools"])]
    if any(each["do"] == "module" for each in changes or ()):
        own.append("importlib")
    lines = [*(f"import {name}" for name in sorted(own)), "", "import torch"]
    return machine.HEAD + "\n".join([*lines, "from diffusers import DiffusionPipeline"])


def model_code(reference: str) -> str:
    """Return a model's folder or Hub id as code.

    Raises:
        InputError: it was made in memory, so a script could not open it.
    """
    if not reference:
        raise InputError(
            "This model was made in memory, so a script could not open it. Save it with "
            "model.save_pretrained(folder) and open that folder. A loop of your own fits a script on the "
            "workbench: format='workbench'."
        )
    if reference in zoo.models():
        return repr(str(zoo.path(reference)))
    folder = Path(reference).expanduser()
    return repr(str(folder.resolve()) if folder.is_dir() else reference)


def constants_code(experiment: Experiment) -> str:
    """Return what a script runs, as constants."""
    source, target = runs_of(experiment)
    return "\n".join([*shared_code(experiment), f"SOURCE = {source!r}", f"TARGET = {target!r}"])


def shared_code(experiment: Experiment) -> list[str]:
    """Return what all runs of a script have in common, as constants."""
    return [
        f"MODEL = {model_code(experiment.model)}",
        f"REVISION = {experiment.revision!r}",
        f"SETTINGS = {experiment.settings()!r}",
        f"THREADS = {torch.get_num_threads()}  # as in the run: on a CPU the last bits depend on it",
    ]


def runs_of(experiment: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a script's source and target are told: a prompt, if the model takes one, and a seed."""
    own = experiment.seed if experiment.source_seed is None else experiment.source_seed
    told = ((experiment.source, own), (experiment.target, experiment.seed))
    source, target = (
        {**({} if prompt is None else {"prompt": prompt}), "seed": seed} for prompt, seed in told
    )
    return source, target
