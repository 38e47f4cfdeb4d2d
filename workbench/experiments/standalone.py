"""An experiment as a script that needs diffusers and torch alone.

Everything a user typed enters a script through ``repr``, so that a prompt stays a string whatever it holds.
The script says its changes as data; the machine that makes them is the same in every script, less what that
one does not need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench import zoo
from workbench.attention.heads import head_count, projection_path
from workbench.errors import InputError
from workbench.experiments import machine
from workbench.experiments.changes import (
    AblateSpec,
    Change,
    ForceMapSpec,
    InjectSpec,
    LayerChange,
    ModuleSpec,
    PatchSpec,
    ReweightSpec,
    Runs,
    ScaleSpec,
    SiteChange,
    SteerSpec,
    TurnSpec,
)
from workbench.experiments.experiment import Experiment, Fork, rerun
from workbench.experiments.scripts import Code, literal
from workbench.experiments.surveying import Group, Survey
from workbench.interventions.intervention import BY_HEAD, numbered
from workbench.interventions.scale import drawn
from workbench.models.model import DiffusionModel
from workbench.tracing.guards import KERNEL_PORTS
from workbench.tracing.ledger import ALL
from workbench.tracing.record import Record
from workbench.tracing.sites import Site, resolve
from workbench.tracing.structure import Leaf, leaves

Place = tuple[str, str, Leaf, int | None]
"""Where a value passes in a script, see `workbench.experiments.machine`."""

_ELSE = "Export this one as a script on the workbench: format='workbench'."
_SCHEDULER = "scheduler.step"
_PORTS = {"input", "inputs", "output", *KERNEL_PORTS}


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
    if experiment.acting(target.ledger.steps) or experiment.forks:
        parts = _Plan(experiment, source, target, allow_code).parts()
    else:
        parts = [_head(), _constants(experiment), machine.OPEN, machine.PLAIN]
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
        self.denoisers = {row.component for row in (*source.ledger, *target.ledger)}
        self.changes: list[dict[str, Any]] = []
        self._parted = bool(experiment.forks or _turns(experiment.interventions))
        self._allow_code = allow_code
        self._runs = experiment.runs(source, target, allow_code=allow_code)
        self._lines = self._stem()

    def parts(self) -> list[str]:
        """Return the script, part by part."""
        kinds = list(dict.fromkeys(each["do"] for each in self.changes))
        values = [kind for kind in kinds if kind in machine.KINDS]
        edits = [kind for kind in kinds if kind in machine.EDIT_KINDS]
        ports = {place[1] for each in self.changes for place in (*each["at"], *each.get("from", ()))}
        parts = [machine.BRANCHES] if self.experiment.forks else []
        parts.append(machine.MACHINE)
        if any("mask" in each or each["do"] == "force_map" for each in self.changes):
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
        running = [*self._before(), *self._lines]
        branches, modules = bool(self.experiment.forks), "module" in kinds
        head = _head(runs=True, branches=branches, modules=modules)
        return [head, _constants(self.experiment), self._data(), machine.OPEN, *parts, "\n".join(running)]

    def _data(self) -> str:
        lines = [
            "# Each change: what to do at which places (module, port, which tensor, heads), in which of the",
            "# denoiser's or the scheduler's calls, to which rows of the batch, as (branch, of branches).",
            f"CHANGES = {literal(self.changes)}",
            f"DENOISERS = {sorted(self.denoisers)!r}",
        ]
        return "\n".join(lines)

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
                other = _model_code(self.experiment.source_model)
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
        """Return the changes of a run as code: those at sites, then the edits, which see what these left."""
        changes = [self._change(each, branch.run) for each in branch.sites]
        for survey in branch.surveys:
            changes += [self._edit(survey.edit, group, branch.run) for group in survey.groups()]
        numbers = [self._number(each) for each in changes]
        if not numbers:
            return ""
        if numbers == list(range(len(numbers))) and not self._parted:
            return "CHANGES"
        return f"[{', '.join(f'CHANGES[{number}]' for number in numbers)}]"

    def _number(self, change: dict[str, Any]) -> int:
        """Return the number of a change in the script, which says it once."""
        if change not in self.changes:
            self.changes.append(change)
        return self.changes.index(change)

    def _check_alike(self, leaving: int) -> None:
        for row in self.target.ledger:
            if row.step < leaving and row.branches != self.source.ledger[row.call].branches:
                raise InputError(
                    "The source and the target do not call the denoiser alike, so a script cannot make the "
                    f"one from the other. {_ELSE}"
                )

    # The changes, as data.

    def _change(self, change: SiteChange, run: Record) -> dict[str, Any]:
        plan: dict[str, Any] = {"do": change.kind, "at": [self._place(change.site)]}
        plan["calls"] = Calls(_calls(change, run))
        if change.heads is not None:
            _, count = self._layer(Site.parse(change.site))
            plan["heads"] = numbered(change.heads, count, what="heads", site=change.site)
        if change.words is not None or change.tokens is not None:
            plan["tokens"] = self._tokens(change)
        plan |= _partly(change)
        if isinstance(change, ScaleSpec):
            plan["factor"] = change.factor
        elif isinstance(change, PatchSpec):
            given = Calls(_given(change, run, self.source))
            plan |= {"runs": ["source"], "given": given, "from": [self._place(change.captures[0])]}
            if (tokens := self._from_tokens(change)) is not None:
                plan["from_tokens"] = tokens
        elif isinstance(change, AblateSpec):
            plan |= self._ablation(change, plan["at"], run)
        elif isinstance(change, SteerSpec):
            runs = [("prompt", prompt) for pair in change.pairs for prompt in pair]
            plan |= {"runs": runs, "method": change.method, "seen": self._seen(change), "from": plan["at"]}
        else:
            assert isinstance(change, ModuleSpec)
            change.check_trusted(self._allow_code)
            own = change.model_dump(include={"module", "arguments", "feature", "to", "times"})
            plan |= {name: value for name, value in own.items() if value is not None or name == "arguments"}
        return plan

    def _ablation(self, change: AblateSpec, place: list[Place], run: Record) -> dict[str, Any]:
        if change.how == "zero":
            return {"do": "zero"}
        if change.how == "noise":
            return {"do": "noise", "seed": change.seed}
        runs = [("prompt", prompt) for prompt in change.references]
        taken = {"from": place, "given": Calls(_given(change, run, self.target))}
        if change.how == "resample":
            return {"do": "patch", **taken, "runs": [runs[drawn(change.seed, len(runs))]]}
        return {"do": "mean", **taken, "runs": runs}

    def _edit(self, edit: LayerChange, group: Group, run: Record) -> dict[str, Any]:
        """Return an edit of attention in layers where it acts alike."""
        calls = {call: rows for call, rows in _calls(edit, run).items() if call in group.calls}
        plan: dict[str, Any] = {
            "do": edit.kind,
            "at": [(path, "kernel", (), 0) for path in group.layers],
            "calls": Calls(calls),
            "image": group.place.image,
        }
        if edit.heads is not None:
            _, count = self._layer(Site(group.layers[0], "heads"))
            plan["heads"] = numbered(edit.heads, count, what="heads", site=group.layers[0])
        plan |= _partly(edit)
        keys = [list(columns) for columns in group.place.keys]
        if isinstance(edit, ReweightSpec):
            plan["words"] = list(zip(keys, edit.words.values(), strict=True))
        elif isinstance(edit, ForceMapSpec):
            picture = [list(row) for row in edit.map]
            plan |= {"keys": keys[0], "map": picture, "shape": group.place.shape}
        else:
            assert isinstance(edit, InjectSpec)
            given = {call: rows for call, rows in _given(edit, run, self.source).items() if call in calls}
            places = [(edit.site, port, (), 0) for port in ("query", "key")]
            plan |= {"runs": ["source"], "given": Calls(given), "from": places}
        return plan

    def _place(self, spelled: str) -> Place:
        site = Site.parse(spelled)
        if site.path == _SCHEDULER and site.port in ("input", "output"):
            return (site.path, site.port, self._leaf(site), None)
        inside = site.path.partition(".")[0] in self.denoisers
        if inside and site.port == "heads":
            layer, count = self._layer(site)
            projection = projection_path(layer)
            if projection is not None:
                return (f"{site.path}.{projection}", "input", (), count)
            return (site.path, "output", (), count)
        leaf = self._leaf(site)
        if not inside or site.port not in _PORTS or (site.port == "inputs" and not leaf):
            raise InputError(
                "A standalone script changes what passes the scheduler or modules of a denoiser, one tensor "
                f"each, not {spelled}. {_ELSE}"
            )
        return (site.path, site.port, leaf, 0 if site.port in KERNEL_PORTS else None)

    def _layer(self, site: Site) -> tuple[nn.Module, int]:
        """Return an attention layer and how many heads a site of it has."""
        model = self.target.model
        assert isinstance(model, DiffusionModel)
        layer = resolve(model.denoisers, site.path)
        assert isinstance(layer, nn.Module)
        for run in (self.source, self.target):
            if site.port in KERNEL_PORTS and str(site) in run.captured:
                return layer, int(run.passages(site)[0].value.shape[1])
        return layer, head_count(layer) or 1

    def _leaf(self, site: Site) -> Leaf:
        """Return where in the value the tensor is, spelled out also where the site leaves it to us."""
        if site.leaf or str(site) not in self.source.captured:
            return site.leaf
        found = list(leaves(self.source.passages(site)[0].value))
        return found[0][0] if len(found) == 1 else ()

    def _seen(self, change: SteerSpec) -> list[tuple[int, int, int]]:
        """Return the call of each step that a direction is looked for in, and its rows."""
        branch = ALL if change.branch == "both" else change.branch
        steps = sorted(change.act(self.steps))
        return [_passing(self.target, step, branch, _of_scheduler(change))[0] for step in steps]

    def _tokens(self, change: SiteChange) -> list[int]:
        length = self._length(change.site)
        if change.tokens is not None:
            return numbered(change.tokens, length, what="places", site=change.site)
        assert change.words is not None
        return list(self.experiment.places(self.target, change.words)(length))

    def _from_tokens(self, change: PatchSpec) -> list[int] | None:
        length = self._length(change.captures[0])
        if change.from_tokens is not None:
            return numbered(change.from_tokens, length, what="places", site=change.captures[0])
        words = change.words if change.from_words is None else change.from_words
        return None if words is None else list(self.experiment.places(self.source, words)(length))

    def _length(self, site: str) -> int:
        """Return how long the sequence at a site is, from a call of its own if no run kept it."""
        axis = 2 if Site.parse(site).port in BY_HEAD else 1
        for run in (self.source, self.target):
            if site in run.captured:
                return int(run.passages(site)[0].value.shape[axis])
        last = self.target.fork(self.steps - 1, capture=[site], interventions=[])
        return int(last.passages(site)[-1].value.shape[axis])


class Calls(dict[int, list[Any]]):
    """Rows by call; where they are alike in all, it is written as one comprehension."""

    def __repr__(self) -> str:
        keys = list(self)
        if len(keys) > 1 and keys == list(range(keys[0], keys[0] + len(keys))):
            over = f"for call in range({keys[0]}, {keys[-1] + 1})}}"
            if all(each == self[keys[0]] for each in self.values()):
                return f"{{call: {self[keys[0]]!r} {over}"
            rest = [rows[1:] for rows in self[keys[0]]]
            if all([(key, *more) for more in rest] == self[key] for key in keys):
                said = ", ".join(f"({', '.join(['call', *map(repr, more)])})" for more in rest)
                return f"{{call: [{said}] {over}"
        return super().__repr__()


def _turns(acting: Sequence[Any]) -> list[TurnSpec]:
    return [each for each in acting if isinstance(each, TurnSpec)]


def _calls(change: Change, run: Record) -> dict[int, list[tuple[int, int]]]:
    """Return for each call of a run the rows that are changed, as (branch, of branches)."""
    chosen: dict[int, list[tuple[int, int]]] = {}
    for row in run.ledger:
        if row.step not in change.act(run.ledger.steps):
            continue
        if _of_scheduler(change):
            chosen[row.tick] = [(0, 1)]
        elif branches := [each for each in row.branches if change.branch in (ALL, "both", each)]:
            chosen[row.call] = [(row.branches.index(each), len(row.branches)) for each in branches]
    return chosen


def _given(change: Any, run: Record, source: Record) -> dict[int, list[tuple[int, int, int]]]:
    """Return for each call of a run, and each of its rows, the call of another run and the rows there."""
    early, whole = getattr(change, "from_step", None), _of_scheduler(change)
    calls, found = _calls(change, run), {}
    for row in run.ledger:
        call, given = row.tick if whole else row.call, []
        for index, _ in calls.get(call, ()):
            branch = ALL if whole else row.branches[index]
            own = [each for each, _, _ in _passing(run, row.step, branch, whole)]
            nth = 0 if early is not None else own.index(call)
            given.append(_passing(source, row.step if early is None else early, branch, whole)[nth])
        if given:
            found[call] = given
    return found


def _partly(change: Change) -> dict[str, Any]:
    """Return how much of a change is made, and where."""
    found: dict[str, Any] = {} if change.strength == 1 else {"strength": change.strength}
    return found if change.mask is None else {**found, "mask": [list(row) for row in change.mask]}


def _of_scheduler(change: Change) -> bool:
    return isinstance(change, SiteChange) and Site.parse(change.site).path == _SCHEDULER


def _passing(run: Record, step: int, branch: str, whole: bool) -> list[tuple[int, int, int]]:
    """Return what passes in a step: the calls (or, of the scheduler, the ticks) and the rows in each."""
    rows = run.ledger.at(step, branch)
    if whole:
        return [(tick, 0, 1) for tick in dict.fromkeys(row.tick for row in rows)]
    return [
        (row.call, 0, 1) if branch == ALL else (row.call, row.branches.index(branch), len(row.branches))
        for row in rows
    ]


def _model_code(reference: str) -> str:
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


def _head(*, runs: bool = False, branches: bool = False, modules: bool = False) -> str:
    needed = {"contextlib": runs, "functools": runs, "importlib": modules, "pathlib": branches}
    own = ["argparse", *(name for name, wanted in needed.items() if wanted)]
    lines = [*(f"import {name}" for name in own), "", "import torch"]
    return machine.HEAD + "\n".join([*lines, "from diffusers import DiffusionPipeline"])


def _constants(experiment: Experiment) -> str:
    lines = [
        f"MODEL = {_model_code(experiment.model)}",
        f"REVISION = {experiment.revision!r}",
        f"SOURCE = {_run_of(experiment.source, experiment.source_seed, experiment.seed)!r}",
        f"TARGET = {_run_of(experiment.target, None, experiment.seed)!r}",
        f"SETTINGS = {experiment.settings()!r}",
        f"THREADS = {torch.get_num_threads()}  # as in the run: on a CPU the last bits depend on it",
    ]
    return "\n".join(lines)


def _run_of(prompt: str | None, own_seed: int | None, seed: int) -> dict[str, Any]:
    words = {} if prompt is None else {"prompt": prompt}
    return {**words, "seed": seed if own_seed is None else own_seed}
