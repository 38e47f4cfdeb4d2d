"""Whether a run's edits acted, and, where one did not, why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from workbench.errors import NotFiniteError, OutOfOrderError, nearest
from workbench.tracing.clock import Clock, Tick
from workbench.tracing.ledger import GUIDED, Row
from workbench.tracing.replay import Replay
from workbench.tracing.sites import Site
from workbench.tracing.steps import covers


class Acted:
    """Keeps which edits acted in a run, and where what they wait for passed.

    Args:
        clock: of the run.
        replay: what is repeated of another run, if anything is.
    """

    def __init__(self, clock: Clock, replay: Replay | None) -> None:
        self._clock = clock
        self._replay = replay
        self._done: set[tuple[int, str]] = set()
        self._last: tuple[Any, str, int] | None = None
        self._passed: dict[Site, set[bool]] = {}

    def passing(self, place: Site, row: Row | None) -> None:
        """Note that a value passes where an edit waits: in a call that is computed, or elsewhere."""
        self._passed.setdefault(place, set()).add(row is not None and not self._repeats(row))

    def note(self, edit: Any, site: str, row: Row | None) -> None:
        """Note that an edit acts."""
        self._done.add((id(edit), site))
        self._last = None if row is None else (edit, site, row.step)

    def before(self, edit: Any, component: str = "") -> bool:
        """Whether an edit had its moments in what a fork repeats, and none in what it computes.

        Args:
            edit: with ``steps`` and ``branch``.
            component: the denoiser whose calls it acts in; any other name stands for all calls.
        """
        due = [row for row in self._rows(component) if self._due(edit, row)]
        repeated = [row for row in due if self._repeats(row)]
        inherited = self._replay is not None and any(
            each is edit for each in self._replay.record.spec.interventions
        )
        return bool(repeated) and (inherited or len(repeated) == len(due))

    def check(self, edits: Sequence[Any]) -> None:
        """Refuse a run in which one of the edits did nothing.

        Raises:
            OutOfOrderError: with the edit and why.
        """
        for edit in edits:
            for site in edit.sites:
                if (id(edit), str(site)) in self._done or self.before(edit, site.path.partition(".")[0]):
                    continue
                raise OutOfOrderError(
                    f"{type(edit).__name__} at {site} changed nothing: {self._why(edit, site)} The run is on "
                    "the error: error.record."
                )

    def check_passed(self, sites: Sequence[Site]) -> None:
        """Refuse a run that never came to some sites; a fork may have repeated that part.

        Raises:
            OutOfOrderError: with the site.
        """
        for site in sites:
            if self._replay is None and Site(site.path, site.port) not in self._passed:
                raise OutOfOrderError(
                    f"{site} changed nothing: {_never(site)} The run is on the error: error.record."
                )

    def check_finite(self, tick: Tick, latents: torch.Tensor) -> None:
        """Refuse latents that a tick makes infinite, or no numbers, after an edit acted.

        Raises:
            NotFiniteError: with the step and the last edit before it.
        """
        if self._last is None or torch.isfinite(latents).all() or not torch.isfinite(tick.before).all():
            return
        edit, site, step = self._last
        raise NotFiniteError(
            f"The latents are not finite after step {tick.step}; the last change before that was "
            f"{type(edit).__name__} at {site}, in step {step}. Look at its strength, factor or module."
        )

    def _why(self, edit: Any, site: Site) -> str:
        passed = self._passed.get(Site(site.path, site.port), set())
        computed = [row for row in self._clock.ledger if not self._repeats(row)]
        branches = list(dict.fromkeys(branch for row in computed for branch in row.branches))
        if not passed:
            return _never(site)
        if passed == {False} and any(self._due(edit, row) for row in computed):
            return (
                f"{site.path} was called outside of the denoising steps alone, and interventions act in "
                "them. Replace its value in a block: with model.generate(prompt) as run: …"
            )
        if computed and not any(_has(row, edit.branch) for row in computed):
            return f"the run has no branch {edit.branch!r}.{nearest(edit.branch, branches)}"
        steps = sorted({row.step for row in computed})
        said = f"steps {steps[0]} to {steps[-1]} were computed" if steps else "no step was computed"
        return f"{said}, and {site.path} was not called in its steps {edit.steps!r}."

    def _due(self, edit: Any, row: Row) -> bool:
        return _has(row, edit.branch) and covers(edit.steps, row, self._clock.total_steps)

    def _rows(self, component: str) -> list[Row]:
        mine = component in self._clock.system.denoisers
        return [row for row in self._clock.ledger if not mine or row.component == component]

    def _repeats(self, row: Row) -> bool:
        return self._replay is not None and self._replay.covers(row)


def _has(row: Row, branch: str) -> bool:
    return branch == GUIDED or row.has(branch)


def _never(site: Site) -> str:
    return f"{site} never passed in this run, since {site.path} was not called."
