"""Keeps the step ledger of a run, by watching the denoisers and ``scheduler.step``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from workbench.errors import InputError
from workbench.tracing import prediction
from workbench.tracing.branches import Branches
from workbench.tracing.ledger import Ledger, Row
from workbench.tracing.picture import picture_of, texts_of
from workbench.tracing.rig import Method, Rig
from workbench.tracing.scheduler_call import SchedulerCall
from workbench.tracing.stages import Stages
from workbench.tracing.structure import Leaf, put
from workbench.tracing.system import System, told, told_time


@dataclass(frozen=True)
class Tick:
    """One ``scheduler.step``.

    Attributes:
        index: counts them from 0.
        step: what the progress bar will count it as.
        timestep: what the scheduler was stepped with.
        noise_pred: the guided prediction handed to the scheduler, ``(batch, channels, ...)``.
        before: the latents before, the same shape.
        pred_x0: the predicted clean sample, or None.
    """

    index: int
    step: int
    timestep: float
    noise_pred: torch.Tensor
    before: torch.Tensor
    pred_x0: torch.Tensor | None


Guided = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
Left = Callable[[int, int], torch.Tensor | None]


class Clock:
    """The run's three clocks.

    ``rows`` is how many samples the run makes: a denoiser batch of twice as many holds two guidance
    branches, and ``prompt`` tells which of them has the words. ``started`` is called with each row as the
    denoiser is entered, ``finished`` with the row and what it returned, ``ticked`` with each tick and the
    latents after it, ``guided`` may replace the prediction that the scheduler is handed with the latents, and
    ``left`` what a step leaves of them.
    """

    def __init__(self, system: System, rows: int | None, prompt: Any = None) -> None:
        self.system = system
        self.ledger = Ledger()
        self.row: Row | None = None
        self.ticks = 0
        self.started: list[Callable[[Row], None]] = []
        self.finished: list[Callable[[Row, Any], None]] = []
        self.ticked: list[Callable[[Tick, torch.Tensor], None]] = []
        self.guided: Guided | None = None
        self.left: Left | None = None
        self._stages = Stages(system)
        self._branches = Branches(system, rows, prompt, given=system.branches)
        self._tick: Tick | None = None
        self._stepping = False

    def attach(self, rig: Rig) -> None:
        """Watch every denoiser's entry and every scheduler of the system."""
        self._branches.attach(rig)
        self._stages.attach(rig, lambda: self.ticks)
        for name, module in self.system.denoisers.items():
            rig.before(module, self._entering(name))
            rig.after(module, self._leaving, last=True)
            if hasattr(module, "cache_context"):
                rig.wrap(module, "cache_context", self._labelling)
        for scheduler in self.system.schedulers.values():
            step = Method(scheduler, "step")
            rig.before(step, self._step_begins)
            rig.before(step, self._tick_begins, last=True)
            rig.after(step, self._tick_ends, last=True)

    @property
    def rows(self) -> int | None:
        """How many samples the run makes, if known."""
        return self._branches.rows

    @property
    def now(self) -> Row | None:
        """The row that what passes now belongs to.

        In ``scheduler.step`` it is the tick's last call, with the one branch ``guided``: guidance has
        made one of its branches. None before, between and after the calls.
        """
        if self.row is None and self._stepping and self.ledger:
            last: Row = self.ledger[-1]
            return last.guided
        return self.row

    @property
    def total_steps(self) -> int | None:
        """How many steps the run will have; None until the scheduler of its last stage has been told."""
        return self._stages.total

    @property
    def coming(self) -> int:
        """The step that what passes between the calls belongs to: the next tick's, or after all the last."""
        step, total = self._stages.step_of(self.ticks), self.total_steps
        return step if total is not None and step < total else self._stages.step_of(max(self.ticks - 1, 0))

    def step_of(self, tick: int) -> int:
        """Return the step that a tick of the present stage belongs to."""
        return self._stages.step_of(tick)

    def _entering(self, component: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            scheduler, denoiser = self._stages.scheduler, self.system.denoisers[component]
            given = told(denoiser, args, kwargs)
            timestep = self._next_timestep(told_time(denoiser, given))
            self._stages.called(self.ticks, timestep)
            earlier = sum(1 for _ in self._of_this_tick())
            row = Row(
                call=len(self.ledger),
                tick=self.ticks,
                step=self._stages.step_of(self.ticks),
                timestep=timestep,
                sigma=None if scheduler is None else prediction.sigma(scheduler, timestep),
                branches=self._branches.of(component, args, kwargs, earlier),
                component=component,
                samples=self._branches.rows,
                picture=picture_of(given),
                texts=texts_of(given),
            )
            self.ledger.add(row)
            self.row = row
            for listener in self.started:
                listener(row)

        return enter

    def _leaving(self, _: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        row, self.row = self.row, None
        if row is not None:
            for listener in self.finished:
                listener(row, output)

    def _labelling(self, cache_context: Callable[..., Any]) -> Callable[..., Any]:
        def label(name: str, *args: Any, **kwargs: Any) -> Any:
            self._branches.label = name
            return cache_context(name, *args, **kwargs)

        return label

    def _step_begins(self, *_: Any) -> None:
        self._stepping = True

    def _tick_begins(
        self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note what the scheduler is stepped with, after every edit of it."""
        call = SchedulerCall.of(scheduler, args, kwargs)
        self._stages.stepped(scheduler, self.ticks)
        index, at = self.ticks, self._stages.step_of(self.ticks)
        model_output, sample, when = call.model_output, call.sample, call.timestep
        if self.guided is not None:
            model_output = self.guided(index, at, model_output, sample)
        self._confirm(scheduler, when)
        self._tick = Tick(
            index, at, when, model_output, sample, prediction.clean(scheduler, model_output, sample, when)
        )
        self.ticks += 1
        self._branches.label = None
        return call.handing_over(model_output)

    def predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Return x₀ as predicted by what the scheduler is about to be stepped with; None if unknown."""
        scheduler = self._stages.scheduler
        call = SchedulerCall.of(scheduler, args, kwargs)
        return prediction.clean(scheduler, call.model_output, call.sample, call.timestep)

    def handing(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: torch.Tensor
    ) -> tuple[Leaf, torch.Tensor | None]:
        """Return where the scheduler is handed the prediction, and the one by which x₀ is as wanted."""
        scheduler = self._stages.scheduler
        call = SchedulerCall.of(scheduler, args, kwargs)
        told = (call.model_output, call.sample, call.timestep)
        return call.leaf, prediction.output_for(scheduler, wanted, *told)

    def _tick_ends(self, _: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        tick, self._tick, self._stepping = self._tick, None, False
        if isinstance(output, torch.Tensor):
            raise InputError(
                "scheduler.step returned a bare tensor. Let it return a tuple with the new sample first, "
                "(sample,), or an output with prev_sample, as those of diffusers do."
            )
        after = output[0] if isinstance(output, tuple) else output.prev_sample
        assert tick is not None
        left = None if self.left is None else self.left(tick.index, tick.step)
        if left is not None and not torch.equal(left := left.to(after.device, after.dtype), after):
            output, after = put(output, (0,), left, site="scheduler.step"), left
        for listener in self.ticked:
            listener(tick, after)
        return output

    def _confirm(self, scheduler: Any, timestep: float) -> None:
        """Write what the scheduler was really stepped with into the rows of this tick."""
        for row in self._of_this_tick():
            if row.timestep != timestep:
                sigma = prediction.sigma(scheduler, timestep)
                self.ledger.amend(row.model_copy(update={"timestep": timestep, "sigma": sigma}))

    def _of_this_tick(self) -> Iterator[Row]:
        """Give the calls of the tick that comes, the last first."""
        return takewhile(lambda row: row.tick == self.ticks, reversed(self.ledger))

    def _next_timestep(self, value: float) -> float:
        """Return the time a denoiser is called with in the scheduler's own unit, which the ledger speaks."""
        scheduler, known = self._stages.scheduler, self._stages.timesteps
        position = getattr(scheduler, "step_index", None)
        if position is not None and int(position) < len(known):
            return float(scheduler.timesteps[int(position)])  # a loop may have changed it in place
        if not known or value in known:
            return value
        # Flow pipelines hand the denoiser t/1000.
        for candidate in (value, value * 1000, 1000 - value * 1000):
            close = min(known, key=lambda each: abs(each - candidate))
            if abs(close - candidate) <= 1e-3 * max(abs(candidate), 1):
                return close
        return value
