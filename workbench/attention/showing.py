"""Shows the kernel calls of one forward of a layer while they happen.

A torch function mode sees them by whatever name they are called, but it sees every other call of torch too,
and each costs. A layer that has been seen to call the kernel by its name in torch is watched there alone from
then on: something stands at the name while such a layer computes, and hands on what others call meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Kernel = Callable[..., torch.Tensor]
Show = Callable[[Kernel, tuple[Any, ...], dict[str, Any]], torch.Tensor]
"""Called in place of the kernel, with it and what it was given."""

KERNEL: Kernel = functional.scaled_dot_product_attention


class Showing:
    """One forward of a layer, from `begin` to `end`.

    Args:
        show: called in place of each kernel call.
        see_cat: told what the layer puts together; only where a mode is on.

    Attributes:
        by_name: whether every kernel call until now was by the kernel's name.
    """

    def __init__(self, show: Show, see_cat: Callable[[Any], None]) -> None:
        self.by_name = True
        self._show = show
        self._see_cat = see_cat
        self._within = False
        self._before: Showing | None = None

    def begin(self) -> None:
        """Show what this thread, or coroutine, calls by the kernel's name."""
        self._before = _SHOWN.get()
        _SHOWN.set(self)
        _NAME.take(self)

    def end(self) -> None:
        """Leave the name as it was; safe to call again."""
        _NAME.leave(self)
        if _SHOWN.get() is self:
            _SHOWN.set(self._before)

    def mode(self) -> TorchFunctionMode:
        """Return a mode in which it is shown what the layer calls by other names, and puts together."""
        return _Mode(self)

    def call(self, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Show a kernel call, but of those made while one is shown: these are not the layer's."""
        if self._within:
            return kernel(*args, **kwargs)
        self._within = True
        try:
            return self._show(kernel, args, kwargs)
        finally:
            self._within = False

    def see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call of torch that the mode has seen."""
        if func is KERNEL and not self._within:
            self.by_name = False
            return self.call(func, args, kwargs)
        if func is torch.cat and not self._within:
            self._see_cat(args[0] if args else kwargs.get("tensors", ()))
        return func(*args, **kwargs)


class _Mode(TorchFunctionMode):
    def __init__(self, showing: Showing) -> None:
        super().__init__()
        self._showing = showing

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._showing.see(func, args, kwargs or {})


class _Name:
    """The kernel's name in torch, which layers take while they compute; several may, of several threads."""

    def __init__(self) -> None:
        self.kernel = KERNEL
        self._lock = threading.Lock()
        self._taken_by: set[Showing] = set()

    def take(self, showing: Showing) -> None:
        """Stand there for a layer."""
        with self._lock:
            if functional.scaled_dot_product_attention is not _stand_in:
                self.kernel = functional.scaled_dot_product_attention
            self._taken_by.add(showing)
            functional.scaled_dot_product_attention = _stand_in

    def leave(self, showing: Showing) -> None:
        """Put the kernel back when no layer needs the name any more."""
        with self._lock:
            self._taken_by.discard(showing)
            if not self._taken_by and functional.scaled_dot_product_attention is _stand_in:
                functional.scaled_dot_product_attention = self.kernel


def _stand_in(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Call the kernel, or show the call if it is that of a layer which is shown."""
    showing = _SHOWN.get()
    return _NAME.kernel(*args, **kwargs) if showing is None else showing.call(_NAME.kernel, args, kwargs)


_stand_in.__name__ = KERNEL.__name__
_SHOWN: ContextVar[Showing | None] = ContextVar("shown", default=None)
_NAME = _Name()
