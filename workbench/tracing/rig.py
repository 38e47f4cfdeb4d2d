"""What we put on somebody's model, and how all of it comes off again.

Each hook and wrapped method is an object that names its owner. A rig notes a target *before* it
touches it and sweeps by owner, so that an interrupt between any two opcodes leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import nn

_MISSING = object()
_HOOK_TABLES = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]


class Owned:
    """A callable that belongs to a rig: a hook, or what shadows the method ``target.name``."""

    def __init__(
        self, owner: Rig, call: Callable[..., Any], before: Any = _MISSING, target: Any = None, name: str = ""
    ) -> None:
        self.owner = owner
        self.call = call
        self.before = before
        self.target = target
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the call on."""
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Leave a copy of the target with its own method: only the original is watched."""
        copied = memo.get(id(self.target))
        if copied is None:
            return self
        if self.before is not _MISSING:
            return deepcopy(self.before, memo)
        return getattr(type(copied), self.name).__get__(copied)


class Rig:
    """Everything one run has put on a model; `sweep` takes it all off."""

    def __init__(self) -> None:
        self._modules: dict[nn.Module, None] = {}
        self._wrapped: list[tuple[Any, str]] = []

    def before(self, module: nn.Module, hook: Before) -> Owned:
        """Call ``hook(module, args, kwargs)`` before each forward of ``module``."""
        self._modules[module] = None
        owned = Owned(self, hook)
        module.register_forward_pre_hook(owned, with_kwargs=True)
        return owned

    def after(self, module: nn.Module, hook: After) -> Owned:
        """Call ``hook(module, args, kwargs, output)`` after each forward."""
        self._modules[module] = None
        owned = Owned(self, hook)
        module.register_forward_hook(owned, with_kwargs=True)
        return owned

    def wrap(self, target: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Shadow the method ``target.name`` by ``make(method)`` on this one object."""
        self._wrapped.append((target, name))
        own = target.__dict__.get(name, _MISSING)
        method = getattr(target, name)
        owned = Owned(self, make(method), own, target, name)
        # Pipelines look at a method's signature to decide what to pass: without this, no generator.
        owned.__wrapped__ = method  # type: ignore[attr-defined]
        target.__dict__[name] = owned

    def drop(self, module: nn.Module, owned: Owned) -> None:
        """Take one hook off."""
        _remove(module, lambda hook: hook is owned)

    def sweep(self) -> None:
        """Take off every hook and wrapped method of this rig; safe to call again."""
        for module in self._modules:
            _remove(module, lambda hook: isinstance(hook, Owned) and hook.owner is self)
        for target, name in reversed(self._wrapped):
            current = target.__dict__.get(name)
            if isinstance(current, Owned) and current.owner is self:
                if current.before is _MISSING:
                    target.__dict__.pop(name, None)
                else:
                    target.__dict__[name] = current.before


def _remove(module: nn.Module, ours: Callable[[Any], bool]) -> None:
    for table, companions in _HOOK_TABLES.items():
        hooks = getattr(module, table)
        for key in [key for key, hook in list(hooks.items()) if ours(hook)]:
            for companion in companions:
                getattr(module, companion).pop(key, None)
            hooks.pop(key, None)
