"""The stages of a run: a cascade has several, each with a scheduler and a progress bar of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from workbench.tracing.rig import Rig
from workbench.tracing.system import System


class Stages:
    """Knows which step a tick belongs to.

    A stage begins when a scheduler is told its timesteps. Steps are counted on from one stage to the
    next, as the bars advance one after the other.

    Attributes:
        scheduler: the one whose stage it is; before the first, the system's first, or None.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self.scheduler: Any = next(iter(system.schedulers.values()), None)
        self._told: set[int] = set()
        self._first_tick = 0
        self._first_step = 0
        self._begins: list[int] = []
        self._read: Any = None
        self._known: list[float] = []

    def attach(self, rig: Rig, ticks: Callable[[], int]) -> None:
        """Watch every scheduler being told its timesteps; ``ticks`` returns how many have been."""
        for scheduler in self._system.schedulers.values():
            if hasattr(scheduler, "set_timesteps"):
                rig.wrap(scheduler, "set_timesteps", partial(self._telling, scheduler, ticks))

    def step_of(self, tick: int) -> int:
        """Return the step that a tick of this stage belongs to.

        The pipelines' progress bars advance after a tick when it is past the warm-up and completes
        the scheduler's order; this counts how often that was before ``tick``.
        """
        if self.scheduler is None:
            return tick
        order = int(getattr(self.scheduler, "order", 1) or 1)
        steps = getattr(self.scheduler, "num_inference_steps", None)
        warm_up = max(len(self.scheduler.timesteps) - int(steps) * order, 0) if steps else 0
        done = tick - self._first_tick
        return self._first_step + max(done // order - warm_up // order, 0)

    @property
    def total(self) -> int | None:
        """How many steps the run will have; None as long as a later stage is to come, or nothing is known."""
        timesteps = self.timesteps
        if not timesteps or len(self._told) < self._expected():
            return None
        begin = getattr(self.scheduler, "begin_index", None)
        first = int(begin) if begin is not None else next(iter(self._begins), 0)
        return self.step_of(self._first_tick + len(timesteps) - first - 1) + 1

    def called(self, tick: int, timestep: float) -> None:
        """Note a call's timestep: a stage may begin in the middle of its scheduler's list.

        Where a timestep comes twice, as PNDM's second does, the calls that follow tell where it began.
        """
        self._told.add(id(self.scheduler))
        timesteps, done = self.timesteps, tick - self._first_tick
        begins = self._begins or range(len(timesteps))
        fitting = [
            begin for begin in begins if begin + done < len(timesteps) and timesteps[begin + done] == timestep
        ]
        self._begins = fitting or self._begins

    def stepped(self, scheduler: Any, tick: int) -> None:
        """Note which scheduler really makes ``tick``, the first of its stage."""
        if scheduler is not self.scheduler and tick == self._first_tick:
            self.scheduler = scheduler

    def _telling(
        self, scheduler: Any, ticks: Callable[[], int], set_timesteps: Callable[..., Any]
    ) -> Callable[..., Any]:
        def tell(*args: Any, **kwargs: Any) -> Any:
            done = ticks()
            if done > self._first_tick:
                # The last tick of a stage completes a step, whatever the scheduler's order.
                self._first_step = self.step_of(done - 1) + 1
            self.scheduler, self._first_tick, self._begins = scheduler, done, []
            self._told.add(id(scheduler))
            return set_timesteps(*args, **kwargs)

        return tell

    def _expected(self) -> int:
        """Return how many stages the system is made for.

        Not every scheduler makes one: an upscaler's second only adds noise to what it is given.
        """
        return min(len(self._system.schedulers), max(len(self._system.denoisers), 1))

    @property
    def timesteps(self) -> list[float]:
        """The scheduler's timesteps; a list from one to zero also names the end, which is no step."""
        timesteps = getattr(self.scheduler, "timesteps", None)
        if timesteps is not self._read:
            known = [] if timesteps is None else [float(each) for each in _listed(timesteps)]
            unit = len(known) > 1 and known[0] <= 1 and known[-1] == 0
            self._read, self._known = timesteps, known[:-1] if unit else known
        return self._known


def _listed(timesteps: Any) -> list[Any]:
    """Return timesteps as a list, in one copy from where they are."""
    listed: list[Any] = timesteps.tolist() if hasattr(timesteps, "tolist") else list(timesteps)
    return listed
