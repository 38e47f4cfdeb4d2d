"""Branches of an experiment: runs that leave another at a step, and how they are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from workbench.errors import InputError
from workbench.experiments.change import MOST, Runs, SiteChange
from workbench.experiments.changes import AnySpec, TurnSpec
from workbench.experiments.conflicts import check_order
from workbench.experiments.noise import check_begun
from workbench.interventions.intervention import Intervention
from workbench.tracing.record import Record
from workbench.tracing.session import Listener

_TURN = {"step", "prompt", "guidance_scale", "noise", "arguments"}


class Fork(TurnSpec):
    """A branch that leaves a run: from its step on with other arguments, further interventions, or both.

    Attributes:
        interventions: acting from the step on, after those of the run it leaves.
        forks: branches that leave this one.
    """

    kind: Literal["fork"] = "fork"  # type: ignore[assignment]
    interventions: Annotated[tuple[AnySpec, ...], Field(max_length=MOST, fail_fast=True)] = ()
    forks: Annotated[tuple[Fork, ...], Field(max_length=MOST, fail_fast=True)] = ()

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.changes() and not self.interventions:
            raise ValueError(
                "a fork changes something: prompt, guidance_scale, noise, arguments or interventions"
            )
        return self

    def acting(self, steps: int) -> list[Any]:
        """Return what acts in the branch of runs of ``steps`` steps: its own arguments first."""
        told = [TurnSpec(**self.model_dump(include=_TURN))] if self.changes() else []
        return [*told, *acting_in(self.interventions, steps, self.step, every=True)]


@dataclass(frozen=True)
class Branch:
    """What a fork's run left behind, and the branches that leave it."""

    fork: Fork
    record: Record
    branches: tuple[Branch, ...]


def named(branches: Sequence[Branch], stem: str = "branch") -> list[tuple[str, Record]]:
    """Return the runs of a tree of branches with a name each: ``branch-0``, ``branch-0-1``, and so on."""
    found: list[tuple[str, Record]] = []
    for number, branch in enumerate(branches):
        name = f"{stem}-{number}"
        found += [(name, branch.record), *named(branch.branches, name)]
    return found


def rerun(
    run: Record,
    acting: Sequence[Any],
    runs: Runs,
    before: Sequence[tuple[Any, Intervention]] = (),
    *,
    listener: Listener | None = None,
    start: int | None = None,
) -> Record:
    """Return a run with changes: a fork at the first of them, and one more at each turn after it.

    Args:
        run: what is changed.
        acting: interventions and turns, as data.
        runs: what the interventions take from.
        before: interventions that go first: those of the run, each with what it was as data.
        listener: told how the runs go on.
        start: the step to fork at; None is the first that anything is changed in.

    Raises:
        InputError: a turn is at a step that the run has not.
    """
    steps, prompt = run.ledger.steps, run.spec.arguments.get("prompt")
    now = prompt
    turns = [each for each in acting if isinstance(each, TurnSpec)]
    edits = [each for each in acting if not isinstance(each, TurnSpec)]
    bound = [(each, each.bind(runs.of(prompt))) for each in edits]
    first = first_of(edits, steps) if start is None else start
    for turn in turns:
        turn.check(steps)
    stages: list[TurnSpec | None] = [*([] if turns and turns[0].step <= first else [None]), *turns]
    for stage, after in zip(stages, [*stages[1:], None], strict=True):
        # An edit of what only a later turn's prompt says must not act before it.
        until = steps if after is None else after.step
        mine = [*before, *((each, edit) for each, edit in bound if each.within(0, until, steps))]
        told = {} if stage is None else stage.changes()
        at = first if stage is None else stage.step
        now = told.get("prompt", now)
        made = [edit if now == prompt else _worded(each, edit, runs.of(now)) for each, edit in mine]
        if "latents" in told:
            told["latents"] = told["latents"].latents(run)
        run = run.fork(at, interventions=made, capture=(), listener=listener, **told)
        if "latents" in told:
            check_begun(run, told["latents"])
    return run


def _worded(each: Any, edit: Intervention, runs: Runs) -> Intervention:
    """Return an intervention as it is in another prompt's run: its words are of that prompt there."""
    return each.bind(runs) if isinstance(each, SiteChange) and each.words is not None else edit


def acting_in(changes: Sequence[Any], steps: int, start: int, *, every: bool = False) -> list[Any]:
    """Return changes without the steps before ``start``: those that take from the source, or every one.

    Raises:
        InputError: one names a step that the runs have not, or, of every one, none from ``start`` on.
    """
    found = []
    for each in changes:
        if not isinstance(each, TurnSpec) and start and (every or each.captures):
            acts = each.act(steps)
            late = tuple(sorted(step for step in acts if step >= start))
            if not late and every:
                raise InputError(
                    f"{each.kind} acts in steps {sorted(acts)} alone, and the fork begins at step {start}, "
                    "so it would change nothing there."
                )
            if not late:
                continue
            found.append(each if len(late) == len(acts) else each.model_copy(update={"steps": late}))
        else:
            if not isinstance(each, TurnSpec):
                each.act(steps)  # refuses steps that are not there
            found.append(each)
    return found


def first_of(changes: Sequence[Any], steps: int) -> int:
    """Return the first of ``steps`` steps that any of the changes acts in; ``steps`` if none does."""
    firsts = [each.step if isinstance(each, TurnSpec) else min(each.act(steps)) for each in changes]
    return min(firsts, default=steps)


def every_fork(forks: Sequence[Fork]) -> list[Fork]:
    """Return the branches of a tree, each before those that leave it."""
    return [each for fork in forks for each in (fork, *every_fork(fork.forks))]


def check_forks(
    forks: Sequence[Fork], before: Sequence[Any], steps: int | None = None, step: int = 0
) -> None:
    """Refuse branches that begin before what they leave, or of which one change undoes another.

    A change of a branch may well undo one of the run that it leaves.

    Args:
        forks: the branches.
        before: the changes of the run that they leave.
        steps: how many the runs have, if that is known.
        step: the one at which that run itself left another.

    Raises:
        ValueError: with the branch.
    """
    turned = max((each.step for each in before if isinstance(each, TurnSpec)), default=0)
    for number, fork in enumerate(forks):
        if fork.step < step:
            raise ValueError(
                f"fork {number}, at step {fork.step}, leaves a branch that begins at step {step}"
            )
        if fork.step < turned:
            raise ValueError(
                f"fork {number}, at step {fork.step}, leaves a run that turns later, at step {turned}: make "
                "that turn a fork too"
            )
        if any(isinstance(each, TurnSpec) and each.step <= fork.step for each in fork.interventions):
            raise ValueError(
                f"fork {number}, at step {fork.step}, has a turn that is not later than it begins: a fork "
                "takes other arguments itself"
            )
        check_order(fork.interventions, steps)
        check_forks(fork.forks, (*before, *fork.interventions), steps, fork.step)
