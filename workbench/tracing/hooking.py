"""Hooks of a block's reads: each is on while the block waits, at the modules that the model has then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from workbench.tracing.guards import check, hookable
from workbench.tracing.ports import hook_port
from workbench.tracing.rig import Owned, Rig, Target
from workbench.tracing.session import Session
from workbench.tracing.sites import Site, resolve, resolve_all

PassPlace = Callable[[Site, Any], Any]
"""Handed a place and the value that passes there; what it returns goes on."""


class Hooking:
    """Puts a block's hooks on a run's model.

    Args:
        session: the run.

    Attributes:
        ran_before: which parts ran before the denoiser, with the tick that was coming.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._components = session.system.components
        self._known: set[Site] = set()
        self._open: set[str] = set()
        self._stand_ins: dict[nn.Module, list[Any]] = {}
        self.ran_before: set[tuple[str, int | None]] = set()

    def open_entrances(self, pass_by: PassPlace, rig: Rig) -> None:
        """Have what each denoiser is called with handed to ``pass_by``, for good.

        The pipeline waits for a step in a hook before the denoiser's forward, where it is too late for
        another hook of the same kind.
        """
        clock, denoisers = self._session.clock, self._session.system.denoisers
        for name, part in self._components.items():
            other = isinstance(part, nn.Module) and name not in denoisers
            if other and hookable(self._components, name):
                rig.before(part, lambda *_, name=name: self.ran_before.add((name, clock.ticks)))
        for name, module in denoisers.items():
            hook_port(rig, module, "inputs", partial(pass_by, Site(name, "inputs")))
            self._allow_skip(module)

    def targets(self, place: Site) -> tuple[Target, ...]:
        """Return what a place is in the model as it is now: a block may exchange a module.

        Raises:
            UnknownNameError, GuardError: there is no such place, or nothing can be read there.
        """
        targets = resolve_all(self._components, place.path)
        if place not in self._known:
            check(self._components, [place])
            self._keep_hookable(place.path, itself=place.port not in ("output", "input", "inputs"))
            self._known.add(place)
        return targets

    def hook(self, place: Site, targets: tuple[Target, ...], pass_by: PassPlace) -> list[Owned]:
        """Have what passes a place handed to ``pass_by``, until `drop`."""
        if place.port == "inputs" and place.path in self._session.system.denoisers:
            return []  # There is one, and one that is taken off in a call breaks those behind it.
        if place.port == "inputs" and isinstance(targets[0], nn.Module):
            self._allow_skip(targets[0])
        here = partial(pass_by, place)
        return [hook_port(self._session.rig, target, place.port, here) for target in targets]

    def drop(self, hooks: list[Owned]) -> None:
        """Take off what `hook` has put on."""
        for each in hooks:
            self._session.rig.drop(each)

    def skips(self, target: Target) -> bool:
        """Whether a target's inputs have been hooked, so that it can be skipped when they pass."""
        return target in self._stand_ins

    def skip(self, module: nn.Module, value: Any) -> None:
        """Let a module return a value in the call whose inputs pass now, without running it."""
        self._stand_ins[module].append(value)

    def _allow_skip(self, module: nn.Module) -> None:
        """Shadow a module's forward by one that returns what waits for it, if anything does.

        A call looks its forward up before its hooks run: when its inputs have been read, it is too late.
        """
        if module in self._stand_ins:
            return
        waiting = self._stand_ins[module] = []

        def shadow(forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: waiting.pop() if waiting else forward(*args, **kwargs)

        self._session.rig.wrap(module, "forward", shadow)

    def _keep_hookable(self, path: str, *, itself: bool) -> None:
        """Give every module around ``path``, and perhaps itself, a hook that does nothing.

        A module called without any hook takes a short cut past those added while it runs, and the
        block may well ask for its output from inside it.
        """
        parts = path.split(".")
        for outer in (".".join(parts[:depth]) for depth in range(1, len(parts) + itself)):
            if outer not in self._open:
                self._open.add(outer)
                around = resolve(self._components, outer) if "." in outer else self._components.get(outer)
                if isinstance(around, nn.Module):
                    self._session.rig.after(around, _nothing)


def _nothing(*_: Any) -> None:
    """A hook that leaves everything as it is."""
