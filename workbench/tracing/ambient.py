"""The thread's torch state, so that the pipeline's and the block's do not mix while one waits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode


def _modes() -> list[Any]:
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


@dataclass
class Ambient:
    """Grad mode, CPU autocast and the stack of torch function modes of one side."""

    grad: bool = field(default_factory=torch.is_grad_enabled)
    autocast: bool = field(default_factory=lambda: torch.is_autocast_enabled("cpu"))
    modes: list[Any] = field(default_factory=_modes)

    def restore(self) -> None:
        """Make this the thread's state."""
        torch.set_grad_enabled(self.grad)
        torch.set_autocast_enabled("cpu", self.autocast)
        if _modes() != self.modes:
            for _ in _modes():
                _pop_mode()  # type: ignore[no-untyped-call]
            for mode in self.modes:
                _push_mode(mode)  # type: ignore[no-untyped-call]
