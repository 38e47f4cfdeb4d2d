"""An experiment as a script that needs diffusers and torch alone.

Everything a user typed enters a script through ``repr``, so that a prompt stays a string whatever it holds.
The script says its changes as data; the machine that makes them is the same in every script, less what that
one does not need.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from workbench import zoo
from workbench.errors import InputError
from workbench.experiments import machine, machine_attention
from workbench.experiments.branching import Fork, rerun
from workbench.experiments.change import Change, SiteChange
from workbench.experiments.changes import TurnSpec
from workbench.experiments.experiment import Experiment
from workbench.experiments.opening import Opening
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
    if target.ledger[0].samples not in (None, 1):
        raise InputError(f"A standalone script makes one image, not {target.ledger[0].samples}. {ELSE}")
    with experiment.sampling_as(target):
        if experiment.acting(target.ledger.steps) or experiment.forks:
            parts = _Plan(experiment, source, target, allow_code).parts()
        else:
            parts = [
                head_code(),
                constants_code(experiment),
                machine.ONE_IMAGE,
                opening_code(target.model),
                machine.PLAIN,
            ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


@dataclass(frozen=True)
class _Stretch:
    """Steps of a run under the same arguments, which a script runs at a time.

    Attributes:
        start: the first of them.
        told: arguments of the pipeline that are its own.
        run: with these arguments, but without the changes: it has the same calls.
    """

    start: int
    told: Mapping[str, Any]
    run: Record


class _Plan:
    """What a script does, call by call."""

    def __init__(self, experiment: Experiment, source: Record, target: Record, allow_code: bool) -> None:
        self.experiment = experiment
        self.source = source
        self.target = target
        self.steps = target.ledger.steps
        self._planner = Planner(experiment, source, target, allow_code)
        self.changes: list[dict[str, Any]] = []
        self._parted = bool(experiment.forks) or any(
            isinstance(each, TurnSpec) for each in experiment.interventions
        )
        self._runs = experiment.runs(source, target, allow_code=allow_code)
        self._lines = self._stem()

    def parts(self) -> list[str]:
        """Return the script, part by part."""
        branches = bool(self.experiment.forks)
        running = [*self._before(), *self._lines]
        head = head_code(self.changes, *(["pathlib"] if branches else []))
        own = [machine.ONE_IMAGE, opening_code(self.target.model), *([machine.BRANCHES] if branches else [])]
        constants = [constants_code(self.experiment), data_code(self.changes, self._planner.denoisers)]
        text = "\n".join(running)
        return [head, *constants, *own, *machine_code(self.changes, text), text]

    # The runs, in order.

    def _stem(self) -> list[str]:
        acting = self.experiment.acting(self.steps)
        whole = _Stretch(0, {}, self.target)
        lines, last = self._stretches("changed", acting, whole, "")
        lines.append("changed.image.save(options.out)")
        return lines + self._branches(self.experiment.forks, "changed", acting, last)

    def _branches(self, forks: Sequence[Fork], left: str, before: Sequence[Any], stem: _Stretch) -> list[str]:
        lines = []
        for number, fork in enumerate(forks):
            name = f"{'branch' if left == 'changed' else left}_{number}"
            acting = [*(each for each in before if isinstance(each, Change)), *fork.acting(self.steps)]
            made, last = self._stretches(name, acting, replace(stem, start=fork.step), left)
            lines += [*made, f"{name}.image.save(beside({name.replace('_', '-')!r}))"]
            lines += self._branches(fork.forks, name, acting, last)
        return lines

    def _stretches(
        self, name: str, acting: Sequence[Any], stretch: _Stretch, left: str
    ) -> tuple[list[str], _Stretch]:
        """Return the lines of a run, one for each stretch of steps, and the last of these."""
        turns = [each for each in acting if isinstance(each, TurnSpec)]
        starts = {stretch.start: None, **{turn.step: turn for turn in turns}}
        lines = []
        for start, end in pairwise([*starts, self.steps]):
            turn, run = starts[start], stretch.run
            if start >= self.steps:
                raise InputError(f"The runs have {self.steps} steps; a turn at {start} is in none of them.")
            sites, surveys = [], []
            for each in acting:
                mine = each.within(start, end, self.steps) if isinstance(each, Change) else ()
                if mine and isinstance(each, SiteChange):
                    sites.append(each)
                elif mine:
                    surveys.append(Survey.of(each.model_copy(update={"steps": mine})))
            told = {**stretch.told, **({} if turn is None else turn.changes())}
            if turn is not None and turn.noise is not None:
                changed = stretch.told.get("latents")
                lines.append(f"{name}_noise = {turn.noise.code(run, changed)}")
                told = {**told, "latents": Code(f"{name}_noise")}
            if turn is not None or surveys:
                run = rerun(run, [*([turn] if turn else []), *surveys], self._runs, start=start)
            stretch = _Stretch(start, told, run)
            numbers = add_all(self.changes, self._planner.planned(sites, surveys, run, (start, end)))
            lines.append(self._running(name, told, numbers, (left, start) if left else None))
            left = name
        return lines, stretch

    def _running(
        self, name: str, told: Mapping[str, Any], numbers: Sequence[int], after: tuple[str, int] | None
    ) -> str:
        """Return the line of one run."""
        words = {key: value for key, value in told.items() if key == "prompt"}
        rest = {key: value for key, value in told.items() if key != "prompt"}
        every = not self._parted and list(numbers) == list(range(len(numbers)))
        chosen = "CHANGES" if every else f"[{', '.join(f'CHANGES[{number}]' for number in numbers)}]"
        arguments = [
            f"{{**TARGET, **{words!r}}}" if words else "TARGET",
            *([f"{{**SETTINGS, **{rest!r}}}"] if rest else []),
            *([f"changes={chosen}"] if numbers else []),
            *([f"after={self._after(*after)}"] if after else []),
        ]
        return f"{name} = run({', '.join(arguments)})"

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
                lines.append("target = run(TARGET, keeps='source')  # the run that the source leaves")
                lines.append(f"run(SOURCE, keeps='source', after={self._after('target', leaving)})")
            elif self.experiment.source_model is not None:
                opening, other = Opening.of(self.target.model), model_code(self.experiment.source_model)  # type: ignore[arg-type]
                dtype = f", torch_dtype={opening.dtype}" if opening.dtype else ""
                lines.append(f"other = DiffusionPipeline.from_pretrained({other}{dtype})")
                lines += [f"other.to({opening.device!r})"] if opening.device else []
                lines.append("run(SOURCE, keeps='source', pipeline=other)")
            else:
                lines.append("run(SOURCE, keeps='source')")
        return lines

    def _after(self, name: str, step: int) -> str:
        """Return a run, and how many calls of its scheduler come before a step."""
        return f"({name}, {self.target.ledger.at(step)[0].tick})"

    def _check_alike(self, leaving: int) -> None:
        for row in self.target.ledger:
            if row.step < leaving and row.branches != self.source.ledger[row.call].branches:
                raise InputError(
                    "The source and the target do not call the denoiser alike, so a script cannot make the "
                    f"one from the other. {ELSE}"
                )


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


def opening_code(model: Any) -> str:
    """Return what opens a model as it is open here, and runs it.

    Raises:
        InputError: it differs from what its reference gives in a way that a few lines do not make again.
    """
    opening = Opening.of(model)
    code = machine.OPEN.rstrip("\n")
    if opening.dtype:
        code = code.replace("revision=REVISION)", f"revision=REVISION, torch_dtype={opening.dtype})")
    if opening.device:
        code += f"\npipeline.to({opening.device!r})"
    if opening.scheduler is not None:
        name = opening.scheduler.name
        made = f"pipeline.scheduler = {name}.from_config({literal(opening.scheduler.told)})"
        code = f"from diffusers import {name}\n{code}\n{made}"
    return f"{code}\n\n{machine.GENERATE}"


def machine_code(changes: Sequence[dict[str, Any]], running: str = "") -> list[str]:
    """Return what makes the changes and runs, part by part: only what they need."""
    kinds = list(dict.fromkeys(each["do"] for each in changes))
    values = [kind for kind in kinds if kind in machine.KINDS]
    edits = [kind for kind in kinds if kind in machine_attention.EDIT_KINDS]
    ports = {place[1] for each in changes for place in (*each["at"], *each.get("from", ()))}
    parts = [machine.MACHINE]
    if any("mask" in each or each["do"] == "force_map" for each in changes) or "resized(" in running:
        parts.append(machine.MASK)
    if "mixed(" in running:
        parts.append(machine.NOISE)
    if {"patch", "mean"} & set(values):
        parts.append(machine.TAKEN)
    parts += [machine.KINDS[kind] for kind in values]
    if ports & {"kernel", *KERNEL_PORTS}:
        parts.append(machine_attention.ATTENTION)
    if edits:
        parts.append(machine_attention.EDITING)
        parts += [machine_attention.EDIT_KINDS[kind] for kind in edits]
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
        f"SETTINGS = {literal(experiment.settings())}",
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
