"""The step ledger: one row for each call of a denoiser.

Three clocks: a *call* is one forward of a denoiser, a *tick* one ``scheduler.step``, a *step* what
the pipeline's progress bar counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from workbench.errors import InputError, UnknownNameError, nearest

ALL = "all"
GUIDED = "guided"
"""The one branch of what the scheduler works on: guidance has made it of the others."""


class Row(BaseModel):
    """One call of a denoiser.

    Attributes:
        call: counts the denoiser's calls from 0.
        tick: counts ``scheduler.step`` from 0; the call belongs to the tick that follows it.
        step: counts what the progress bar counts, from 0.
        timestep: what the scheduler was stepped with (0 is clean, for most schedulers 1000 is noise).
        sigma: noise level there, in the scheduler's own convention; None where it has none.
        branches: the guidance branches this call computes, in the order of its batch rows.
        component: the denoiser's name in the pipeline.
        samples: how many samples the run makes, prompts times images; None if that is not known.
        picture: the rows and columns of the latents, after the frames of a film; None if that is not known.
        texts: the lengths of the texts that the denoiser is told, in tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    call: int
    tick: int
    step: int
    timestep: float
    sigma: float | None
    branches: tuple[str, ...]
    component: str
    samples: int | None = None
    picture: tuple[int, ...] | None = None
    texts: tuple[int, ...] = ()

    @property
    def index(self) -> int:
        """The step, under the name it has in ``for step in run.steps``."""
        return self.step

    @property
    def branch(self) -> str:
        """The branch, or the branches in row order joined by ``+``: ``uncond+cond``."""
        return "+".join(self.branches)

    @property
    def guided(self) -> Row:
        """The row as the scheduler has it, with the one branch ``guided``."""
        return self.model_copy(update={"branches": (GUIDED,)})

    @property
    def only(self) -> str | None:
        """``"guided"`` where guidance has joined the branches; else None."""
        return GUIDED if self.branches == (GUIDED,) else None

    def has(self, branch: str) -> bool:
        """Whether this call computes ``branch``."""
        return branch in (ALL, "both") or branch in self.branches

    def rows(self, branch: str, size: int) -> slice:
        """Return which rows of a batch of ``size`` belong to ``branch``.

        Branches lie one after the other, each with all its prompts and images; a batch with heads or
        frames folded in keeps that order, so each branch is an equal stretch.
        """
        if branch in (ALL, "both"):
            return slice(0, size)
        if size % len(self.branches):
            raise InputError(
                f"A batch of {size} rows does not divide into the branches {', '.join(self.branches)} "
                f"of call {self.call}; use branch='all' here."
            )
        width = size // len(self.branches)
        index = self.branches.index(branch)
        return slice(index * width, (index + 1) * width)

    def rows_of(self, samples: Sequence[int], size: int) -> list[int]:
        """Return which of one branch's ``size`` rows belong to some samples, in the order of ``samples``.

        A sample's heads or frames, where they are folded into the batch, stand together.

        Raises:
            InputError: the run has no such sample, or its rows do not divide into samples.
        """
        count = self.samples
        if count is None or size % count:
            raise InputError(
                f"{size} rows do not divide into the {count or 'unknown number of'} samples of this run, so "
                f"samples={list(samples)} cannot be told apart here. Leave samples out."
            )
        for sample in samples:
            if not -count <= sample < count:
                raise InputError(
                    f"The run makes {count} samples (0 to {count - 1}: each prompt with all its images); "
                    f"{sample} is none of them."
                )
        width = size // count
        return [sample % count * width + row for sample in samples for row in range(width)]


class Ledger(Sequence[Row]):
    """The rows of one run, in the order of the calls."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def __eq__(self, other: object) -> bool:
        """Ledgers are equal when their rows are."""
        return isinstance(other, Ledger) and self._rows == other._rows

    __hash__ = None  # type: ignore[assignment]

    def add(self, row: Row) -> None:
        """Append the row of the next call."""
        self._rows.append(row)

    def amend(self, row: Row) -> None:
        """Replace the row of ``row.call`` by what the scheduler has since confirmed."""
        self._rows[row.call] = row

    @property
    def steps(self) -> int:
        """How many steps the run had."""
        return max((row.step for row in self._rows), default=-1) + 1

    @property
    def ticks(self) -> int:
        """How many times the scheduler was stepped."""
        return max((row.tick for row in self._rows), default=-1) + 1

    @property
    def branches(self) -> tuple[str, ...]:
        """Every branch the run computed, in order of appearance."""
        return tuple(dict.fromkeys(branch for row in self._rows for branch in row.branches))

    def at(self, step: int, branch: str = ALL) -> list[Row]:
        """Return the rows of one step; negative steps count from the end.

        Raises:
            InputError: the run has no such step.
            UnknownNameError: the run has no such branch.
        """
        if not -self.steps <= step < self.steps:
            raise InputError(
                f"The run has {self.steps} steps (0 to {self.steps - 1}); {step} is none of them."
            )
        self.check_branch(branch)
        return [row for row in self._rows if row.step == step % self.steps and row.has(branch)]

    def last_tick(self, step: int) -> int:
        """Return the last tick of a step: the one that leaves the step's result."""
        return max(row.tick for row in self.at(step))

    def check_branch(self, branch: str) -> None:
        """Refuse a branch the run does not have.

        Raises:
            UnknownNameError: with the branches there are.
        """
        known = (ALL, "both", *self.branches)
        if branch not in known:
            raise UnknownNameError(f"The run has no branch {branch!r}.{nearest(branch, known)}")

    def __repr__(self) -> str:
        """Return the rows as a table of text."""
        head = f"{'call':>4} {'tick':>4} {'step':>4} {'timestep':>9} {'sigma':>9}  branch"
        lines = [
            f"{row.call:>4} {row.tick:>4} {row.step:>4} {row.timestep:>9.2f} "
            f"{'' if row.sigma is None else format(row.sigma, '9.4f'):>9}  {row.branch} ({row.component})"
            for row in self._rows
        ]
        return "\n".join([head, *lines])
