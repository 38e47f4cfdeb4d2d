"""Derivatives of a scalar of a run's result with respect to its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch

from workbench.errors import InputError, OutOfOrderError, RunStopped
from workbench.tracing.graph import Graph
from workbench.tracing.ledger import ALL, Row
from workbench.tracing.record import Passage, Record
from workbench.tracing.session import Session
from workbench.tracing.sites import Site
from workbench.tracing.steps import Steps, covers, normal
from workbench.tracing.structure import describe, keep_tensor, pick

PRED_X0 = "pred_x0"


class Gradient:
    """The derivative of one number with respect to activations.

    Attributes:
        value: the number.
        record: the run; what its own captures would hold is not kept.
    """

    def __init__(self, value: float, record: Record, derivatives: dict[str, list[Passage]]) -> None:
        self.value = value
        self.record = record
        self._derivatives = Record(record.spec, ledger=record.ledger, captured=derivatives)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose derivatives there are."""
        return tuple(self._derivatives.captured)

    def __getitem__(self, site: str | Site) -> torch.Tensor:
        """Return the derivatives at a site, ``(calls, ...)``, those of the chosen steps in order."""
        return self._derivatives[site]

    def at(self, site: str | Site, *, step: int, branch: str = ALL, nth: int = 0) -> torch.Tensor:
        """Return the derivative at one step, ``(rows, ...)``; see `Record.at`."""
        return self._derivatives.at(site, step=step, branch=branch, nth=nth)

    def __repr__(self) -> str:
        return f"Gradient({self.value:.6g} by {', '.join(self.sites)})"


class Taps(Protocol):
    """An edit that changes nothing, and at whose values a derivative is looked at."""

    steps: Any
    """In which steps, in the form of `workbench.tracing.steps.normal`."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites of the values."""

    def apply(self, site: Site, value: torch.Tensor, row: Row | None, total: int | None) -> torch.Tensor:
        """Return a value that is the same and has a graph."""

    def begin(self, session: Session) -> None:
        """A run begins."""

    @property
    def passed(self) -> bool:
        """Whether there was any value."""

    def back(self, number: torch.Tensor) -> None:
        """Go back through the graph, from a number of the run's result."""


class Values:
    """Taps that keep the derivative with respect to each value, by site."""

    def __init__(self, sites: Sequence[str | Site], steps: Steps) -> None:
        self.sites = tuple(Site.parse(each) for each in sites)
        self.steps = normal(steps)
        self.derivatives: dict[str, list[Passage]] = {str(site): [] for site in self.sites}
        self._held: list[tuple[Site, Row, torch.Tensor]] = []
        self._session: Session | None = None
        if not self.sites:
            raise InputError("wrt is empty. Name the sites whose derivatives are wanted.")

    def begin(self, session: Session) -> None:
        """Note the run, which says what is computed again."""
        self._session = session

    def apply(self, site: Site, value: torch.Tensor, row: Row | None, total: int | None) -> torch.Tensor:
        """Hold a value, and let the run go on with a copy: no later in-place edit reaches what is held."""
        if row is None or not covers(self.steps, row, total) or not torch.is_grad_enabled():
            return value
        held = value if value.requires_grad else value.detach().requires_grad_()
        if self._session is not None and not self._session.recomputing:
            self._held.append((site, row, held))
        return held.clone()

    @property
    def passed(self) -> bool:
        """Whether any value is held."""
        return bool(self._held)

    def back(self, number: torch.Tensor) -> None:
        """Keep the derivative of ``number`` with respect to every value held."""
        found = torch.autograd.grad(number, [value for _, _, value in self._held], allow_unused=True)
        for (site, row, value), gradient in zip(self._held, found, strict=True):
            kept = keep_tensor(torch.zeros_like(value) if gradient is None else gradient)
            self.derivatives[str(site)].append(Passage(row.call, kept, row.only))


class Differentiation:
    """A probe that goes back through a run when it has come to its result.

    Args:
        of: makes the number of the result: a tensor without dimensions.
        taps: what looks at the derivatives.
        result: what ``of`` is given: a site, or ``"pred_x0"``; of several that pass, the last.
        result_step: take the result as this step leaves it, and end the run there; None is at the end.

    Attributes:
        value: the number, when the run has ended.
    """

    def __init__(
        self,
        of: Callable[[torch.Tensor], torch.Tensor],
        *,
        taps: Taps,
        result: str | Site,
        result_step: int | None,
    ) -> None:
        if not callable(of):
            raise InputError(f"of={of!r} is no function. Give one that makes a number of the result.")
        self.of = of
        self.taps = taps
        self.edits = (taps,)
        self.name = str(result)
        self.sites = () if self.name == PRED_X0 else (Site.parse(result),)
        self.until = None if result_step is None else normal(result_step)
        self.value = math.nan
        self._result: torch.Tensor | None = None
        self._graph = Graph(_from_first(taps.steps), recompute=True)

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Keep the graph; at the end of the run, while all hooks are still there, go back through it."""
        session.clock.ticked.append(lambda tick, _: self._ticked(session, tick))
        self.taps.begin(session)
        with self._graph.watching(session):
            with suppress(_ResultReached):
                yield
            self._go_back()

    def take(self, session: Session, site: Site, value: Any) -> None:
        """Note the result as it passes."""
        if self._wanted(session, session.clock.now):
            self._result = pick(value, site.leaf, site=str(site))

    def deliver(self, record: Record) -> None:
        """Nothing: the derivatives are not the record's."""

    def _wanted(self, session: Session, row: Row | None) -> bool:
        if self.until is None:
            return True
        return row is not None and covers(self.until, row, session.clock.total_steps)

    def _ticked(self, session: Session, tick: Any) -> None:
        row = session.clock.ledger[-1]
        if not self._wanted(session, row):
            return
        if not self.sites:
            self._result = tick.pred_x0
        if self.until is not None and self._result is not None and _last_of_step(session, row):
            raise _ResultReached

    def _go_back(self) -> None:
        result, self._result = self._result, None
        if result is None:
            raise OutOfOrderError(
                f"{self.name} never passed in this run, so there is no result. Name what does: "
                "'latents', 'noise_pred', 'pred_x0', or a site."
            )
        if not self.taps.passed:
            raise OutOfOrderError(
                f"{', '.join(map(str, self.taps.sites))} did not pass in the steps that were chosen, "
                "before the result. Steps are those of the denoiser; what it does not contain passes in none."
            )
        with torch.enable_grad():
            number = self.of(result)
        _check(number, result)
        self.taps.back(number)
        self.value = float(number.detach())


class _ResultReached(RunStopped):
    """Ends a run whose result is there."""


def _from_first(steps: Any) -> Any:
    """Return the steps whose graph is needed: from the first chosen one to the end."""
    if steps is None:
        return None
    if isinstance(steps, slice):
        if steps.step is not None and steps.step < 0:
            raise InputError(f"steps={steps!r} runs backwards. Give them forwards.")
        return slice(steps.start, None)
    if min(steps) < 0 <= max(steps):
        raise InputError(f"steps={list(steps)!r} counts some from the start and some from the end.")
    return slice(min(steps), None)


def _last_of_step(session: Session, row: Row) -> bool:
    """Whether the tick that has just ended is the last of its step."""
    return session.clock.step_of(session.clock.ticks) != row.step


def _check(number: Any, result: torch.Tensor) -> None:
    if not isinstance(number, torch.Tensor) or number.ndim:
        given = describe(number) if isinstance(number, torch.Tensor) else type(number).__name__
        raise InputError(
            f"of(result) returned {given}; a derivative is taken of one number. Reduce it: "
            f"lambda result: result.mean(), where result is {describe(result)}."
        )
    if not number.requires_grad:
        raise InputError(
            "of(result) has no graph back to the activations. Compute it with torch from the result, "
            "without detach(), numpy() or float(), and choose steps before the result."
        )
