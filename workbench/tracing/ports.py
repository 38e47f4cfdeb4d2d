"""Ports: which value is meant at a module or method, and how to get hold of it.

Further ports can be added by name (`add_port`); `workbench.attention` adds those of attention layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from workbench.tracing.rig import Owned, Rig, Target

PassBy = Callable[[Any], Any]
"""Sees a value and returns the one to go on with: the same object where nothing is to change."""

Attach = Callable[[Rig, Target, PassBy], Owned]

PORTS: dict[str, Attach] = {}
"""Every port by its name."""


def add_port(name: str, attach: Attach) -> None:
    """Make a port known.

    Args:
        name: as written after the colon of a site.
        attach: puts a hook on a target that hands each value to ``pass_by``; raises one of the
            `WorkbenchError`s if the target has no such value.
    """
    PORTS[name] = attach


def hook_port(rig: Rig, target: Target, port: str, pass_by: PassBy) -> Owned:
    """Let ``pass_by`` see, and perhaps change, the value at a target's port on each call."""
    return PORTS[port](rig, target, pass_by)


def _output(rig: Rig, target: Target, pass_by: PassBy) -> Owned:
    return rig.after(target, lambda _owner, _args, _kwargs, output: pass_by(output))


def _inputs(rig: Rig, target: Target, pass_by: PassBy) -> Owned:
    return rig.before(target, lambda _owner, args, kwargs: pass_by((args, kwargs)))


def _input(rig: Rig, target: Target, pass_by: PassBy) -> Owned:
    def first(
        _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (pass_by(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: pass_by(kwargs[name])}

    return rig.before(target, first)


add_port("input", _input)
add_port("inputs", _inputs)
add_port("output", _output)
