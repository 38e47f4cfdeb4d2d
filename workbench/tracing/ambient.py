"""The thread's torch state, so that the pipeline's and the block's do not mix while one waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _python_dispatch as dispatch

_DEVICES = ("cpu", "cuda")
"""Kinds of device that have an autocast of their own."""


def _function_modes() -> list[Any]:
    return _get_current_function_mode_stack()  # type: ignore[no-untyped-call, no-any-return]


def _dispatch_modes() -> list[Any]:
    return dispatch._get_current_dispatch_mode_stack()


def _autocast() -> list[tuple[str, bool, torch.dtype]]:
    return [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES
    ]


def drop_modes(modes: Sequence[Any]) -> None:
    """Take torch function modes off the thread's stack, wherever on it they are."""
    above: list[Any] = []
    try:
        while any(mode in modes for mode in _function_modes()):
            top = _pop_mode()  # type: ignore[no-untyped-call]
            if top not in modes:
                above.append(top)
    finally:
        for mode in reversed(above):
            _push_mode(mode)  # type: ignore[no-untyped-call]


def other_noise() -> None:
    """Let torch's own random numbers on the CPU go on from another place, which that of now determines."""
    now = torch.Generator()
    now.set_state(torch.get_rng_state())
    torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=now)))


@dataclass
class Ambient:
    """Grad mode, autocast by device, the stacks of torch function and dispatch modes of one side.

    Attributes:
        noise: the state of torch's own random numbers, where each side has its own; else None.
    """

    noise: torch.Tensor | None = None

    grad: bool = field(default_factory=torch.is_grad_enabled)
    autocast: list[tuple[str, bool, torch.dtype]] = field(default_factory=_autocast)
    function_modes: list[Any] = field(default_factory=_function_modes)
    dispatch_modes: list[Any] = field(default_factory=_dispatch_modes)

    def restore(self, now: Ambient | None = None) -> None:
        """Make this the thread's state, which now is ``now``; None is not known, as after an interrupt."""
        now = now or Ambient()
        if self.noise is not None:
            torch.set_rng_state(self.noise)
        if self.grad != now.grad:
            torch.set_grad_enabled(self.grad)
        if self.autocast != now.autocast:
            for device, enabled, dtype in self.autocast:
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
        if self.dispatch_modes != now.dispatch_modes:
            for mode in reversed(_dispatch_modes()):
                dispatch._pop_mode(getattr(mode, "_mode_key", None))
            for mode in self.dispatch_modes:
                dispatch._push_mode(mode)
        if self.function_modes != now.function_modes:
            for _ in _function_modes():
                _pop_mode()  # type: ignore[no-untyped-call]
            for mode in self.function_modes:
                _push_mode(mode)  # type: ignore[no-untyped-call]
