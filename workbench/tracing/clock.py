"""Keeps the step ledger of a run, by watching the denoisers and ``scheduler.step``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.tracing import prediction
from workbench.tracing.ledger import GUIDED, Ledger, Row
from workbench.tracing.rig import Method, Rig
from workbench.tracing.system import System


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


_STEP_ARGUMENTS = ("model_output", "timestep", "sample")

Guided = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]


class Clock:
    """The run's three clocks.

    ``rows`` is how many samples the run makes: a denoiser batch of twice as many holds two guidance
    branches. ``started`` is called with each row as the denoiser is entered, ``finished`` with the row and
    what
    it returned, ``ticked`` with each tick and the latents after it, ``guided`` may replace the
    prediction that the scheduler is handed with the latents.
    """

    def __init__(self, system: System, rows: int | None) -> None:
        self.system = system
        self.rows = rows
        self.ledger = Ledger()
        self.row: Row | None = None
        self.ticks = 0
        self.started: list[Callable[[Row], None]] = []
        self.finished: list[Callable[[Row, Any], None]] = []
        self.ticked: list[Callable[[Tick, torch.Tensor], None]] = []
        self.guided: Guided | None = None
        self._context: str | None = None
        self._tick: Tick | None = None
        self._stepping = False

    def attach(self, rig: Rig) -> None:
        """Watch every denoiser's entry and every scheduler of the system."""
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
    def now(self) -> Row | None:
        """The row that what passes now belongs to.

        In ``scheduler.step`` it is the tick's last call, with the one branch ``guided``: guidance has
        made one of its branches. None before, between and after the calls.
        """
        if self.row is None and self._stepping and self.ledger:
            last: Row = self.ledger[-1]
            return last.model_copy(update={"branches": (GUIDED,)})
        return self.row

    @property
    def total_steps(self) -> int | None:
        """How many steps the run will have, once the scheduler has been told; before, None."""
        scheduler = next(iter(self.system.schedulers.values()), None)
        timesteps = getattr(scheduler, "timesteps", None)
        if scheduler is None or timesteps is None or len(timesteps) == 0:
            return None
        begin = int(getattr(scheduler, "begin_index", None) or 0)
        return self.step_of(len(timesteps) - begin - 1, scheduler) + 1

    def step_of(self, tick: int, scheduler: Any) -> int:
        """Return the step that a tick belongs to.

        The pipelines' progress bars advance after a tick when it is past the warm-up and completes
        the scheduler's order; this counts how often that was before ``tick``.
        """
        order = int(getattr(scheduler, "order", 1) or 1)
        steps = getattr(scheduler, "num_inference_steps", None)
        total = len(scheduler.timesteps)
        warm_up = max(total - int(steps) * order, 0) if steps else 0
        return sum(1 for done in range(tick) if done + 1 > warm_up and (done + 1) % order == 0)

    def _entering(self, component: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            scheduler = next(iter(self.system.schedulers.values()), None)
            timestep = self._next_timestep(scheduler, args, kwargs)
            row = Row(
                call=len(self.ledger),
                tick=self.ticks,
                step=self.ticks if scheduler is None else self.step_of(self.ticks, scheduler),
                timestep=timestep,
                sigma=None if scheduler is None else prediction.sigma(scheduler, timestep),
                branches=self._branches(args, kwargs),
                component=component,
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
            self._context = name
            return cache_context(name, *args, **kwargs)

        return label

    def _step_begins(self, *_: Any) -> None:
        self._stepping = True

    def _tick_begins(
        self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Note what the scheduler is stepped with, after every edit of it."""
        model_output, timestep, sample = _step_arguments(args, kwargs)
        index, at = self.ticks, self.step_of(self.ticks, scheduler)
        if self.guided is not None:
            model_output = self.guided(index, at, model_output, sample)
        when = float(timestep)
        self._confirm(scheduler, when)
        self._tick = Tick(
            index, at, when, model_output, sample, prediction.clean(scheduler, model_output, sample, when)
        )
        self.ticks += 1
        self._context = None
        if args:
            return (model_output, *args[1:]), kwargs
        return args, {**kwargs, _STEP_ARGUMENTS[0]: model_output}

    def predict(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Return x₀ as predicted by what the scheduler is about to be stepped with; None if unknown."""
        scheduler = next(iter(self.system.schedulers.values()))
        model_output, timestep, sample = _step_arguments(args, kwargs)
        return prediction.clean(scheduler, model_output, sample, float(timestep))

    def _tick_ends(self, _: Any, _args: Any, _kwargs: Any, output: Any) -> None:
        tick, self._tick, self._stepping = self._tick, None, False
        after = output[0] if isinstance(output, tuple) else output.prev_sample
        assert tick is not None
        for listener in self.ticked:
            listener(tick, after)

    def _confirm(self, scheduler: Any, timestep: float) -> None:
        """Write what the scheduler was really stepped with into the rows of this tick."""
        for row in reversed(self.ledger):
            if row.tick != self.ticks:
                break
            if row.timestep != timestep:
                sigma = prediction.sigma(scheduler, timestep)
                self.ledger.amend(row.model_copy(update={"timestep": timestep, "sigma": sigma}))

    def _next_timestep(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        told = kwargs.get("timestep", kwargs.get("timesteps", args[1] if len(args) > 1 else None))
        value = float(told.flatten()[0]) if isinstance(told, torch.Tensor) else float(told or 0)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            return value
        position = getattr(scheduler, "step_index", None)
        if position is not None and int(position) < len(timesteps):
            return float(timesteps[int(position)])
        # Flow pipelines hand the denoiser t/1000; the scheduler's own unit is what the ledger speaks.
        known = [float(each) for each in timesteps]
        for candidate in (value, value * 1000, 1000 - value * 1000):
            close = min(known, key=lambda each: abs(each - candidate))
            if abs(close - candidate) <= 1e-3 * max(abs(candidate), 1):
                return close
        return value

    def _branches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
        if self._context is not None:
            return (self._context,)
        sample = args[0] if args else next(iter(kwargs.values()), None)
        batch = sample.shape[0] if isinstance(sample, torch.Tensor) and sample.ndim else 1
        if self.rows is not None and batch % self.rows == 0 and batch > self.rows:
            ways = batch // self.rows
            if ways > 2:
                return tuple(f"guide{way}" for way in range(ways))
            labels = kwargs.get("class_labels")
            return ("cond", "uncond") if _null_class_last(labels, self.rows) else ("uncond", "cond")
        earlier = sum(1 for row in self.ledger if row.tick == self.ticks)
        return (("cond", "uncond")[earlier] if earlier < 2 else f"guide{earlier}",)


def _step_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    given = {**dict(zip(_STEP_ARGUMENTS, args, strict=False)), **kwargs}
    model_output, timestep, sample = (given[name] for name in _STEP_ARGUMENTS)
    return model_output, timestep, sample


def _null_class_last(labels: Any, rows: int) -> bool:
    """Whether the second half of a guided batch is without a class: the null class is the highest."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or len(labels) != 2 * rows:
        return False
    return bool(labels[:rows].max() < labels[rows:].min())
