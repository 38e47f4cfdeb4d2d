"""The ``with`` block: the pipeline runs as a coroutine and waits where the block asks for a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeGuard

import torch
from torch import nn

from workbench.errors import InputError, OutOfOrderError, TraceError
from workbench.tracing.by_hand import note
from workbench.tracing.coroutine import Coroutine
from workbench.tracing.hooking import Hooking
from workbench.tracing.ledger import Row
from workbench.tracing.reads import ReadTensor, plain, read
from workbench.tracing.record import Record
from workbench.tracing.rig import Method, Target
from workbench.tracing.session import Session
from workbench.tracing.sites import Site, bare
from workbench.tracing.structure import Leaf, check_fit, describe, pick, put
from workbench.tracing.values import RunValues
from workbench.tracing.walk import Steps


@dataclass
class Pause:
    """Where the pipeline waits: at a site's value, or at the start of a denoiser call."""

    row: Row | None
    place: Site | None = None
    value: Any = None


class Trace(RunValues):
    """A run in a ``with`` block.

    Reading a site lets the pipeline go on until the value passes, and no further; what is not asked
    for costs nothing. After the block it has run to its end and the trace has all that a record has.
    """

    def __init__(
        self,
        session: Session,
        *,
        begin: Callable[[Trace], None],
        end: Callable[[Session], None],
        finish: Callable[[Record], None],
    ) -> None:
        self._session = session
        self._begin = begin
        self._end = end
        self._finish = finish
        own_noise = session.own_noise
        hands_over = own_noise and session.record.spec.seed is None
        self._coroutine = Coroutine(session.run, own_noise=own_noise, hands_over=hands_over)
        session.rig.inside = self._coroutine.inside
        self._hooking = Hooking(session)
        self._pause: Pause | None = None
        self._seen: dict[Site, Any] = {}
        self._seen_in: Row | None = None
        self._step: int | None = None
        self._call: int | None = None
        self._within: Row | None = None
        self._early = False
        self._wanted: Site | None = None
        self._catch: Callable[[Row], bool] | None = None
        self._ending = "by itself"
        self._installed = False
        self._stopped = False

    def __enter__(self) -> Self:
        if self._coroutine.begun:
            raise TraceError("A run happens once. Call model.generate(…) again for another.")
        try:
            self._begin(self)
            self._session.clock.started.append(self._call_starts)
            self._session.attached.append(partial(self._hooking.open_entrances, self._pass))
            self._session.ready.append(self._coroutine.wait)
            self._coroutine.begin()
            return self
        except BaseException:
            self._end(self._session)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            try:
                try:
                    if kind is None:
                        self._step, self._catch = None, None
                        while not self.ended:
                            self._resume()
                        self._finish(self._session.record)
                finally:
                    self._coroutine.end()
            finally:
                self._end(self._session)
        finally:
            self._end(self._session)
        self._session.let_go()

    @property
    def record(self) -> Record:
        """What the run left behind; complete after the block."""
        return self._session.record

    @property
    def steps(self) -> Steps:
        """The run's steps, for ``for step in run.steps[5:10]``."""
        return Steps(self)

    iter = steps

    @property
    def sigma(self) -> float | None:
        """The noise level of the call the run is at, in the scheduler's own convention."""
        row = self._pause.row if self._pause is not None else None
        if row is None:
            raise TraceError("The run is at no denoiser call, so there is no noise level. See run.ledger.")
        return row.sigma

    @property
    def calls(self) -> Any:
        """In the block: go from denoiser call to call, of which a step may have several.

        Each guidance branch, each half of a step. After the block: what the record has of each call.
        """
        return self.record.calls if self.ended else self._each_call()

    @property
    def ticks(self) -> Any:
        """In the block: go from tick to tick, of which a second-order scheduler has two a step.

        Each gives the row of its first call. After the block: what the record has of each tick.
        """
        return self.record.ticks if self.ended else self._each_tick()

    def _each_call(self) -> Iterator[Row]:
        while not self.ended and (row := self.go_to_next_call()) is not None:
            yield row

    def _each_tick(self) -> Iterator[Row]:
        ledger = self.record.ledger
        for row in self._each_call():
            if row.call == 0 or ledger[row.call - 1].tick != row.tick:
                yield row

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if hasattr(type(self), name):
            raise self.__dict__.pop("_failed", None) or AttributeError(name)
        if not self.ended and name not in ("ledger", "captured", "spec"):
            raise TraceError(f"run.{name} is there after the block has ended; the run is still going on.")
        return getattr(self._session.record, name)

    def value(self, site: Site) -> Any:
        """Return the value at ``site``, letting the pipeline run up to it."""
        place = self._reach(site)
        value = self._seen[place]
        leaf = _leaf_of(site, value)
        return read(pick(value, leaf, site=str(site)) if leaf else value)

    def replace(self, site: Site, new: Any) -> None:
        """Let the run go on with ``new`` in place of the value at ``site``."""
        place = self._reach(site)
        if self._pause is None or self._pause.place != place:
            raise OutOfOrderError(
                f"{site} has already passed in {self._where(self._seen_in)}; the run is at {self._spot()} "
                "now. Replace a value before reading what comes after it."
            )
        new = plain(new)
        old = self._pause.value
        leaf = _leaf_of(site, old)
        check_fit(pick(old, leaf, site=str(site)) if leaf else old, new, site=str(site))
        note(self.record, site, self._pause.row)
        self._pause.value = put(old, leaf, new, site=str(site))
        self._seen[place] = self._pause.value

    def skip(self, path: str, value: Any) -> None:
        """Let the module at ``path`` return ``value`` the next time it is called, without running it.

        Its hooks and those of others see ``value`` as its output; what is inside it does not run.

        Args:
            path: of a module, such as ``unet.mid_block``.
            value: what it shall return: a tensor, or whatever structure of them it would have returned.

        Raises:
            OutOfOrderError: the module has been entered already in this call.
        """
        place = Site(path, "inputs")
        self._start(Site(path))
        target, *_ = self._hooking.targets(place)
        if isinstance(target, Method):
            raise InputError(f"{path} is a method; only a module can be skipped.")
        self._reach(place)
        if self._pause is None or self._pause.place != place or not self._hooking.skips(target):
            raise OutOfOrderError(f"{path} is running already; the run is at {self._spot()}. Skip it before.")
        note(self.record, Site(path), self._pause.row)
        self._hooking.skip(target, plain(value))

    def gradient(self, number: torch.Tensor, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the derivative of a number with respect to values that were read before it.

        The run must keep its graph: ``model.generate(prompt, graph=range(5, 10))``. `DiffusionModel.gradient`
        does without holding every step in memory.

        Args:
            number: a tensor without dimensions, computed from values of the run.
            *values: values as they were read, or tensors put in their place.

        Raises:
            InputError: the number has no graph, or a value is not in it.
        """
        if not isinstance(number, torch.Tensor) or number.ndim or not number.requires_grad:
            given = describe(number) if isinstance(number, torch.Tensor) else type(number).__name__
            raise InputError(
                f"A derivative is taken of one number that has a graph, not of {given}. Open the run with "
                "graph=steps, compute the number with torch from what is read there, and reduce it: .mean()."
            )
        sources = [each.source if isinstance(each, ReadTensor) else each for each in values]
        try:
            return torch.autograd.grad(plain(number), sources, retain_graph=True)
        except RuntimeError as error:
            raise InputError(
                f"The number does not depend on one of the values: {error}. Read them in the steps of "
                "graph=…, before what the number is made of."
            ) from None

    def stop(self) -> None:
        """End the run here; what has been seen until now stays in the record.

        The record then has no output, and its ledger ends with the call that was under way.
        """
        self._coroutine.check_thread()
        self._stopped, self._ending = True, "by run.stop()"
        self._coroutine.end()
        self._pause = None

    @property
    def stopped(self) -> bool:
        """Whether `stop` has ended the run."""
        return self._stopped

    def go_to_step(self, step: int) -> Row:
        """Let the pipeline run to the start of ``step``.

        Raises:
            OutOfOrderError: the run is past it, has ended before it, or calls no denoiser in it.
        """
        ledger, row = self.record.ledger, self._starting
        if row is None or row.step != step or not self._is_first(row):
            if ledger and step <= ledger[-1].step:
                raise OutOfOrderError(
                    f"Step {step} has {'begun' if step == ledger[-1].step else 'passed'}: the run is at "
                    f"{self._spot()}. Steps only go on; ask for a later one, or for this one before."
                )
            self._step, self._catch = None, lambda row: row.step >= step
            self._resume()
            self._catch = None
            row = self._starting
        if row is None:
            raise OutOfOrderError(
                f"The run ended {self._ending}, after {ledger.steps} steps, before step {step}."
            )
        if row.step != step:
            raise OutOfOrderError(f"Step {step} has no call of a denoiser; the run is at {self._spot()}.")
        self._step, self._call = step, None
        return row

    def go_to_next_call(self) -> Row | None:
        """Let the pipeline run to the start of the next denoiser call; None when there is no more."""
        self._step = None
        row = self._starting
        if row is None or row.call == self._call:
            self._catch = lambda _: True
            self._resume()
            self._catch = None
            row = self._starting
        self._call = row.call if row is not None else None
        return row

    def leave_step(self, step: int | None) -> None:
        """Reads after a loop are not bound to its last step; another loop may have gone on by then."""
        if self._step == step:
            self._step = None

    def known_steps(self) -> int | None:
        """Return how many steps the run has, letting it start if it must; None if it does not know yet."""
        if not self._session.record.ledger:
            self._catch = lambda _: True
            self._resume()
            self._catch = None
        return self._session.clock.total_steps

    @property
    def ended(self) -> bool:
        """Whether the pipeline has run to its end."""
        return self._coroutine.ended

    @property
    def _starting(self) -> Row | None:
        """The call at whose start the pipeline waits, if it waits at one."""
        return self._pause.row if self._pause is not None and self._pause.place is None else None

    def _is_first(self, row: Row) -> bool:
        """Whether a call is the first of its step."""
        return row.call == 0 or bool(self.record.ledger[row.call - 1].step < row.step)

    def _reach(self, site: Site) -> Site:
        """Let the pipeline run until the value at ``site`` passes, if it has not; return its place."""
        place = Site(site.path, "inputs") if site.port == "input" else bare(site)
        self._forget_past_calls()
        if place not in self._seen:
            self._run_to(place)
        return place

    def _run_to(self, place: Site) -> None:
        self._start(place)
        targets = self._hooking.targets(place)
        row = self._pause.row if self._pause is not None else None
        self._within = row if row is not None and _component(place) == row.component else None
        self._wanted, self._early = place, False
        hooks = self._hooking.hook(place, targets, self._pass)
        try:
            self._resume()
        finally:
            within, self._within, self._wanted = self._within, None, None
            self._hooking.drop(hooks)
        if self._pause is None or self._pause.place != place:
            raise OutOfOrderError(self._missed(place, targets[0], within))

    def _pass(self, place: Site, value: Any) -> Any:
        """In the pipeline: hand a value over, if it is the one that is waited for."""
        if self._wanted != place:
            return value
        row = self._session.clock.now
        if place in self._seen and self._seen_in is row:
            return value
        if _call_of(row) != _call_of(self._seen_in):
            self._seen.clear()
        if row is None and self._is_early(_component(place)):
            self._early = True
            return value
        pause = Pause(row, place, value)
        self._seen_in = row
        self._seen[place] = value
        self._wait(pause)
        return pause.value

    def _is_early(self, component: str) -> bool:
        """Whether a part runs for a later step now: it ran before the denoiser in the present one too."""
        clock = self._session.clock
        if self._step is None or clock.coming <= self._step:
            return False
        began = next((row.tick for row in self.record.ledger if row.step == self._step), None)
        return (component, began) in self._hooking.ran_before

    def _call_starts(self, row: Row) -> None:
        left_step = self._step is not None and row.step > self._step
        left_call = self._within is not None and row.call > self._within.call
        if left_step or left_call or (self._catch is not None and self._catch(row)):
            self._wait(Pause(row))

    def _wait(self, pause: Pause) -> None:
        """In the pipeline: hand over to the block until it asks for more."""
        self._pause = pause
        self._coroutine.wait()

    def _start(self, wanted: Site | None = None) -> None:
        """In the block: let the run put its own hooks on the model, if it has not; the block's come after.

        Raises:
            TraceError: the run has ended, or its block was not entered.
        """
        if self.ended or not self._coroutine.begun:
            asked = f"{wanted} passes no more: the run has" if wanted else "The run has"
            raise TraceError(
                f"{asked} ended {self._ending}, after {self.record.ledger.steps} steps. Ask for a value "
                "before those that come after it, inside the with block."
            )
        self._coroutine.check_thread()
        if not self._installed:
            self._installed = True
            self._go_on()

    def _resume(self) -> None:
        """In the block: let the pipeline go on until it waits or ends."""
        self._start(self._wanted)
        self._session.system.check_unchanged()
        self._pause = None
        self._go_on()

    def _go_on(self) -> None:
        try:
            self._coroutine.resume()
        except BaseException as error:
            self._ending = f"by {type(error).__name__} ({error})"
            raise

    def _forget_past_calls(self) -> None:
        if self._pause is not None and self._pause.row is not self._seen_in:
            self._seen.clear()
            self._seen_in = self._pause.row

    def _missed(self, place: Site, target: Target, within: Row | None) -> str:
        """Say that a value was waited for and did not come, after what, and what can be done."""
        read_before = f" after {list(self._seen)[-1]}, which was read before it" if self._seen else ""
        if _is_list(target):
            inner = ", ".join(list(target._modules)[:4])
            advice = f"A {type(target).__name__} is not called itself; ask for what is in it: {inner}."
        elif self._early:
            advice = (
                "It is called before the denoiser, at whose entrance a step begins. Keep what it puts out in "
                f"every step with model.record(…, capture=['{place}'])."
            )
        elif self._pause is None:
            advice = "Such a run does not call it, or had called it before what was read first."
        else:
            advice = (
                "Values can be read in the order the model computes them, once each call: read it before "
                "what comes after it, or in the next step."
            )
        if self._step is not None or within is not None:
            return (
                f"{place} did not pass again in {self._where(within)}{read_before}; the run is at "
                f"{self._spot()}. {advice}"
            )
        return f"{place} was never reached; the run is at {self._spot()}{read_before}. {advice}"

    def _where(self, row: Row | None) -> str:
        if row is not None:
            return f"step {row.step}, call {row.call}"
        return "this call" if self._step is None else f"step {self._step}"

    def _spot(self) -> str:
        if self._pause is None:
            return "its end"
        at = f"{self._pause.place}" if self._pause.place is not None else "the start of the denoiser"
        return (
            at
            if self._pause.row is None
            else f"{at}, step {self._pause.row.step}, call {self._pause.row.call}"
        )


def _call_of(row: Row | None) -> int | None:
    return None if row is None else row.call


def _component(place: Site) -> str:
    return place.path.partition(".")[0]


def _leaf_of(site: Site, value: Any) -> Leaf:
    """Return a site's selector in what is kept at its place: an ``input`` is the first of the ``inputs``."""
    if site.port != "input":
        return site.leaf
    args, kwargs = value
    return (0, 0, *site.leaf) if args else (1, next(iter(kwargs)), *site.leaf)


def _is_list(target: Target) -> TypeGuard[nn.Module]:
    """Whether a target only holds modules and is not called itself."""
    plain = isinstance(target, nn.Module) and type(target).forward is nn.Module.forward
    return plain and "forward" not in vars(target)
