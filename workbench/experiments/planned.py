"""The changes of experiments as data for standalone scripts: places, calls and rows in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.attention.heads import head_count, projection_path
from workbench.errors import InputError
from workbench.experiments.change import Change, LayerChange, SiteChange
from workbench.experiments.changes import ForceMapSpec, InjectSpec, ReweightSpec
from workbench.experiments.experiment import Experiment
from workbench.experiments.site_changes import (
    AblateSpec,
    CorruptSpec,
    ModuleSpec,
    PatchSpec,
    ReplaceSpec,
    ScaleSpec,
    SteerSpec,
)
from workbench.experiments.surveying import Group, Survey
from workbench.interventions.intervention import BY_HEAD, spread
from workbench.interventions.scale import drawn
from workbench.models.model import DiffusionModel
from workbench.tracing.guards import KERNEL_PORTS
from workbench.tracing.ledger import ALL, Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site, resolve
from workbench.tracing.structure import Leaf, leaves, pick

Place = tuple[str, str, Leaf, int | None]
"""Where a value passes in a script, see `workbench.experiments.machine`."""

ELSE = "Export this one as a script on the workbench: format='workbench'."

_SCHEDULER = "scheduler.step"
_PORTS = {"input", "inputs", "output", *KERNEL_PORTS}


@dataclass(frozen=True)
class _Part:
    """The steps of a run in which changes are said."""

    run: Record
    start: int
    end: int

    @property
    def rows(self) -> list[Row]:
        """The denoiser's calls in them."""
        return [row for row in self.run.ledger if self.start <= row.step < self.end]


class Planner:
    """Says what an experiment changes, call by call.

    Args:
        experiment: what to say.
        source: its source's run.
        target: its target's run.
        allow_code: whether a script may import what the experiment names as modules of one's own.

    Attributes:
        steps: how many the runs have.
        denoisers: the components whose calls are counted.
    """

    def __init__(self, experiment: Experiment, source: Record, target: Record, allow_code: bool) -> None:
        self.experiment = experiment
        self.source = source
        self.target = target
        self.steps = target.ledger.steps
        self.denoisers = {row.component for row in (*source.ledger, *target.ledger)}
        self._allow_code = allow_code

    def planned(
        self,
        sites: Sequence[SiteChange],
        surveys: Sequence[Survey],
        run: Record,
        stretch: tuple[int, int] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the changes of a run: those at sites, then the edits, which see what these left.

        Args:
            sites: the changes at sites.
            surveys: of the edits of attention.
            run: what has the same calls.
            stretch: from which step up to which they act; None is all.

        Raises:
            InputError: something is changed that plain hooks on modules do not reach.
        """
        part = _Part(run, *(stretch or (0, self.steps)))
        changes = [self._change(each, part) for each in sites]
        for survey in surveys:
            changes += [self._edit(survey.edit, group, part) for group in survey.groups()]
        return changes

    def _change(self, change: SiteChange, run: _Part) -> dict[str, Any]:
        plan: dict[str, Any] = {"do": change.kind, "at": [self._place(change.site)]}
        plan["calls"] = Calls(_calls(change, run))
        if change.heads is not None:
            plan["heads"] = list(change.heads)
        if change.words is not None or change.tokens is not None:
            plan["tokens"] = self._tokens(change, run.run)
        plan |= _partly(change, run)
        if change.mask is not None:
            self._check_mask(change, run)
        if isinstance(change, ScaleSpec):
            plan["factor"] = change.factor
        elif isinstance(change, PatchSpec):
            given = Calls(_given(change, run, self.source))
            plan |= {"runs": ["source"], "given": given, "from": [self._place(change.captures[0])]}
            if (tokens := self._from_tokens(change)) is not None:
                plan["from_tokens"] = tokens
        elif isinstance(change, AblateSpec):
            self._check_places(change, change.references, plan.get("tokens", ()))
            plan |= self._ablation(change, plan["at"], run)
            if change.how == "noise" and _of_scheduler(change):
                plan["calls_of_steps"] = {row.tick: row.call for row in run.rows}
        elif isinstance(change, ReplaceSpec):
            plan["value"] = change.value
        elif isinstance(change, CorruptSpec):
            plan["seed"] = change.seed
        elif isinstance(change, SteerSpec) and change.direction is not None:
            plan["direction"] = change.direction
        elif isinstance(change, SteerSpec):
            runs = [("prompt", prompt) for pair in change.pairs for prompt in pair]
            self._check_places(change, [prompt for _, prompt in runs], plan.get("tokens", ()))
            plan |= {"runs": runs, "method": change.method, "seen": self._seen(change), "from": plan["at"]}
        else:
            assert isinstance(change, ModuleSpec)
            change.check_trusted(self._allow_code)
            own = change.model_dump(include={"module", "arguments", "feature", "to", "times"})
            plan |= {name: value for name, value in own.items() if value is not None or name == "arguments"}
        return plan

    def _ablation(self, change: AblateSpec, place: list[Place], run: _Part) -> dict[str, Any]:
        if change.how == "zero":
            return {"do": "zero"}
        if change.how == "noise":
            return {"do": "noise", "seed": change.seed}
        runs = [("prompt", prompt) for prompt in change.references]
        taken = {"from": place, "given": Calls(_given(change, run, self.target))}
        if change.how == "resample":
            return {"do": "patch", **taken, "runs": [runs[drawn(change.seed, len(runs))]]}
        return {"do": "mean", **taken, "runs": runs}

    def _edit(self, edit: LayerChange, group: Group, run: _Part) -> dict[str, Any]:
        """Return an edit of attention in layers where it acts alike."""
        calls = {call: rows for call, rows in _calls(edit, run).items() if call in group.calls}
        plan: dict[str, Any] = {
            "do": edit.kind,
            "at": [(path, "kernel", (), 0) for path in group.layers],
            "calls": Calls(calls),
            "image": group.place.image,
        }
        if edit.heads is not None:
            plan["heads"] = list(edit.heads)
        plan |= _partly(edit, run)
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
                f"each, not {spelled}. {ELSE}"
            )
        return (site.path, site.port, leaf, 0 if site.port in KERNEL_PORTS else None)

    def _layer(self, site: Site) -> tuple[nn.Module, int]:
        """Return an attention layer, and how many heads it has."""
        model = self.target.model
        assert isinstance(model, DiffusionModel)
        layer = resolve(model.denoisers, site.path)
        assert isinstance(layer, nn.Module)
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

    def _tokens(self, change: SiteChange, run: Record) -> list[int]:
        if change.tokens is not None:
            return list(change.tokens)
        assert change.words is not None
        return list(self.experiment.places(run, change.words)(_length(run, change.site)))

    def _check_places(self, change: SiteChange, prompts: Sequence[str], tokens: Sequence[int]) -> None:
        """Refuse words that stand elsewhere in a prompt that is taken from: a script has one choice."""
        if change.words is None or not prompts:
            return
        length = _length(self.target, change.site)
        for prompt in prompts:
            if list(self.experiment.places(self.target, change.words, prompt)(length)) != list(tokens):
                raise InputError(
                    f"words={list(change.words)} stand at other places in {prompt!r}, which a standalone "
                    f"script cannot say. {ELSE}"
                )

    def _check_mask(self, change: SiteChange, run: _Part) -> None:
        """Refuse a mask where the site has no picture for it, as the run would.

        Raises:
            InputError: what passes there is no picture.
        """
        value = pick(_passed(run.run, change.site), (), site=change.site)
        spread(torch.tensor(change.mask), value, run.run.ledger[0], site=change.site)

    def _from_tokens(self, change: PatchSpec) -> list[int] | None:
        if change.from_tokens is not None:
            return list(change.from_tokens)
        words = change.words if change.from_words is None else change.from_words
        if words is None:
            return None
        return list(self.experiment.places(self.source, words)(_length(self.source, change.captures[0])))


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


def _calls(change: Change, run: _Part) -> dict[int, list[tuple[int, int]]]:
    """Return for each call of a run the rows that are changed, as (branch, of branches)."""
    chosen: dict[int, list[tuple[int, int]]] = {}
    for row in run.rows:
        if row.step not in change.act(run.run.ledger.steps):
            continue
        if _of_scheduler(change):
            chosen[row.tick] = [(0, 1)]
        elif branches := [each for each in row.branches if change.branch in (ALL, "both", each)]:
            chosen[row.call] = [(row.branches.index(each), len(row.branches)) for each in branches]
    return chosen


def _given(change: Any, run: _Part, source: Record) -> dict[int, list[tuple[int, int, int]]]:
    """Return for each call of a run, and each of its rows, the call of another run and the rows there."""
    early, whole = getattr(change, "from_step", None), _of_scheduler(change)
    calls, found = _calls(change, run), {}
    for row in run.rows:
        call, given = row.tick if whole else row.call, []
        for index, _ in calls.get(call, ()):
            branch = ALL if whole else row.branches[index]
            own = [each for each, _, _ in _passing(run.run, row.step, branch, whole)]
            nth = 0 if early is not None else own.index(call)
            given.append(_passing(source, row.step if early is None else early, branch, whole)[nth])
        if given:
            found[call] = given
    return found


def _partly(change: Change, run: _Part) -> dict[str, Any]:
    """Return how much of a change is made, and where."""
    found: dict[str, Any] = {} if change.strength == 1 else {"strength": change.strength}
    if change.mask is None:
        return found
    return {**found, "mask": [list(row) for row in change.mask], "picture": run.run.ledger[0].picture}


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


def _length(run: Record, site: str) -> int:
    """Return how long the sequence at a site is in a run."""
    return int(_passed(run, site).shape[2 if Site.parse(site).port in BY_HEAD else 1])


def _passed(run: Record, site: str) -> Any:
    """Return what passes a site of a run at last, from a call of its own if it did not keep it."""
    if site not in run.captured:
        run = run.fork(run.ledger.steps - 1, capture=[site], interventions=[])
    return run.passages(site)[-1].value
