"""Taps on a run's activations and inputs: what attribution patching takes on the way back, and on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from workbench.errors import InputError
from workbench.interventions.patch import Patch
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.session import Session
from workbench.tracing.sites import Site
from workbench.tracing.steps import branch_rows, covers
from workbench.tracing.structure import leaves, pick, put

_Apart = list[tuple[slice, torch.Tensor]]
"""By the rows of a branch, how far the source's activation is from the target's, on the CPU."""


class Products:
    """Taps that keep, of each activation, only its difference to the source's times its derivative.

    Args:
        source: the run whose activations would be put in; they are let go of as they are used.
        sites: where.
        steps: in which steps.
        branch: in which guidance branch's rows.

    In a run without a graph they keep the differences, for those runs that then come with one.
    """

    def __init__(self, source: Record, sites: Sequence[Site], steps: range, branch: str) -> None:
        self.source = source
        self.sites = tuple(sites)
        self.steps = tuple(steps)
        self.branch = branch
        self.passed = False
        self.values: dict[tuple[Site, int], float] = defaultdict(float)
        self._kept: dict[tuple[Site, int], _Apart] = {}
        self._patches = {site: Patch(str(site), branch=branch, source=source) for site in self.sites}
        self._root = torch.zeros((), requires_grad=True)
        self._session: Session | None = None

    def begin(self, session: Session) -> None:
        """Note the run, which says what is computed again."""
        self._session = session

    def apply(self, site: Site, value: torch.Tensor, row: Row | None, total: int | None) -> torch.Tensor:
        """Note how far the source's activation is from this one, and return a copy that is waited at."""
        if row is None or not covers(self.steps, row, total):
            return value
        parts = branch_rows(row, self.branch, value.shape[0])
        if not parts:
            return value
        assert self._session is not None
        if self._session.recomputing:
            return tapped(value, self._root, None)
        self.passed = True
        apart = self._kept.get((site, row.call)) or self._apart(site, value.detach(), row, parts)
        if not torch.is_grad_enabled():
            self._kept[site, row.call] = apart
            return value
        return tapped(value, self._root, partial(self._multiply, (site, row.step), apart))

    def back(self, number: torch.Tensor) -> None:
        """Go back through every tap."""
        torch.autograd.grad(number, self._root)

    def _apart(self, site: Site, value: torch.Tensor, row: Row, parts: list[tuple[str, slice]]) -> _Apart:
        passages, ledger = self.source.captured[str(site)], self.source.ledger
        # The steps come in order: those before have been asked for.
        passages[:] = [each for each in passages if each.call is None or ledger[each.call].step >= row.step]
        patch = self._patches[site]
        return [
            (rows, (patch.new_value(site, value[rows], row, each) - value[rows]).cpu())
            for each, rows in parts
        ]

    def _multiply(self, cell: tuple[Site, int], apart: _Apart, derivative: torch.Tensor) -> None:
        for rows, difference in apart:
            wide = torch.promote_types(derivative.dtype, torch.float32)
            self.values[cell] += float((derivative[rows] * difference.to(derivative)).sum(dtype=wide))


class Measuring:
    """A probe under which taps see a run that has no graph."""

    def __init__(self, taps: Products) -> None:
        self.edits = (taps,)

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Say that a run begins."""
        self.edits[0].begin(session)
        yield

    def deliver(self, record: Record) -> None:
        """Nothing goes into the record."""


class Handed:
    """A probe that notes what a denoiser is handed in each call."""

    def __init__(self) -> None:
        self.calls: dict[int, Any] = {}

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Watch every denoiser; what is handed over again and again is kept once."""
        for module in session.system.denoisers.values():
            session.rig.before(module, partial(self._note, session))
        yield

    def deliver(self, record: Record) -> None:
        """Nothing goes into the record."""

    def _note(self, session: Session, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        row = session.clock.row
        assert row is not None
        self.calls[row.call] = dict(list(leaves((args, kwargs)))[1:])


class Mixing:
    """A probe that hands the denoiser some of what it is handed in another run, but for the latents.

    Args:
        handed: what that is.
        share: how much of it: 1 is all.
    """

    def __init__(self, handed: Handed, share: float) -> None:
        self.handed = handed
        self.share = share
        self._mixed = False

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Stand before every denoiser."""
        for module in session.system.denoisers.values():
            session.rig.before(module, partial(self._mix, session))
        yield
        if not self._mixed:
            raise InputError(
                "The denoiser is handed the same in source and target, but for the latents, so there is no "
                "way from the one to the other. Leave points out."
            )

    def deliver(self, record: Record) -> None:
        """Nothing goes into the record."""

    def _mix(self, session: Session, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        row = session.clock.row
        assert row is not None
        if session.replaying(row):
            return None
        value = (args, kwargs)
        for leaf, other in self.handed.calls[row.call].items():
            own = pick(value, leaf, site="the denoiser's input")
            if not own.is_floating_point() or own.shape != other.shape or torch.equal(own, other):
                continue
            value = put(value, leaf, torch.lerp(own, other, self.share), site="the denoiser's input")
            self._mixed = True
        return value


class _Tap(torch.autograd.Function):
    """A copy of a value, whose derivative is shown to a function on the way back.

    The root is what autograd is asked the derivative by: every tap lies on the way to it.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, root: torch.Tensor, seen: Any) -> torch.Tensor:  # noqa: ARG004
        ctx.seen = seen
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *derivatives: torch.Tensor) -> Any:
        ctx.seen(derivatives[0])
        return derivatives[0], torch.zeros(()), None


def tapped(
    value: torch.Tensor, root: torch.Tensor, seen: Callable[[torch.Tensor], None] | None
) -> torch.Tensor:
    """Return a value with a tap, which computing it again leaves out: there ``seen`` is None."""
    copied: torch.Tensor = _Tap.apply(value, root, seen)  # type: ignore[no-untyped-call]
    return copied
