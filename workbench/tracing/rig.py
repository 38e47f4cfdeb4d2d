"""What we put on somebody's model, and how all of it comes off again.

Each hook and wrapped method is an object that names its owner. A rig notes a target *before* it
touches it and sweeps by owner, so that an interrupt between any two opcodes leaves nothing behind.
So it is with torch's function modes, which are on no model but on the thread.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn
from torch.overrides import TorchFunctionMode

from workbench.tracing.ambient import drop_modes

T = TypeVar("T")

_MISSING = object()
_HOOK_TABLES = {
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
}

Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
After = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], Any]


@dataclass(frozen=True, eq=False)
class Method:
    """A method of a component, where hooks can be put: not every call goes through ``forward``.

    Attributes:
        owner: the module, scheduler or other object whose method it is.
        name: the method's name, ``decode``.
    """

    owner: Any
    name: str


Target = nn.Module | Method
"""What can be hooked: a module (its forward) or a method."""


class Owned(partial[Any]):
    """A callable that belongs to a rig: a hook, or what shadows the method ``target.name``.

    A ``partial`` of nothing, since that passes a call on without a frame of Python.

    Attributes:
        owner: the rig.
        before: of a shadow, what it took the place of on the object itself, if anything.
        target: the module it hooks, or the object whose method it shadows; None for a hook of a method.
        name: the method's name; empty for a hook.
        last: whether a hook stays behind the rig's others at its place, also those added later.
        table: the hooks it stands among, where it hooks a method.
    """

    owner: Rig
    before: Any
    target: Any
    name: str
    last: bool
    table: list[Owned] | None
    __wrapped__: Callable[..., Any]

    @classmethod
    def of(
        cls,
        owner: Rig,
        call: Callable[..., Any],
        *,
        before: Any = _MISSING,
        target: Any = None,
        name: str = "",
        last: bool = False,
    ) -> Owned:
        """Return ``call`` as something that belongs to ``owner``."""
        owned = cls(call)
        owned.owner, owned.before, owned.target = owner, before, target
        owned.name, owned.last, owned.table = name, last, None
        return owned

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Leave a copy of the target with its own method: only the original is watched."""
        copied = memo.get(id(self.target)) if self.name else None
        if copied is None:
            return self
        if self.before is not _MISSING:
            return deepcopy(self.before, memo)
        return getattr(type(copied), self.name).__get__(copied)


class Rig:
    """Everything one run has put on a model; `sweep` takes it all off.

    Attributes:
        inside: whether the code that calls the model now is the run's, where other code goes on beside it:
            hooks and shadows do nothing for that. None is always; it is set before anything is hooked.
    """

    def __init__(self) -> None:
        self.inside: Callable[[], bool] | None = None
        self._modules: dict[nn.Module, None] = {}
        self._wrapped: list[tuple[Any, str]] = []
        self._calls: dict[tuple[int, str], _Calls] = {}
        self._beside: dict[tuple[int, type[Any]], Any] = {}
        self._modes: list[TorchFunctionMode] = []
        self._clean = False

    def before(self, target: Target, hook: Before, *, last: bool = False) -> Owned:
        """Call ``hook(owner, args, kwargs)`` before each forward of a module, or each call of a method."""
        if isinstance(target, Method):
            return _stand(Owned.of(self, hook, last=last), self._calls_of(target).before)
        self._clean, self._modules[target] = False, None
        owned = Owned.of(self, self._for_the_run(hook, _nothing), target=target, last=last)
        target.register_forward_pre_hook(owned, with_kwargs=True)
        self._keep_last(target._forward_pre_hooks)
        return owned

    def after(self, target: Target, hook: After, *, last: bool = False) -> Owned:
        """Call ``hook(owner, args, kwargs, output)`` after each forward, or each call of a method."""
        if isinstance(target, Method):
            return _stand(Owned.of(self, hook, last=last), self._calls_of(target).after)
        self._clean, self._modules[target] = False, None
        owned = Owned.of(self, self._for_the_run(hook, _nothing), target=target, last=last)
        target.register_forward_hook(owned, with_kwargs=True)
        self._keep_last(target._forward_hooks)
        return owned

    def wrap(self, target: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Shadow the method ``target.name`` by ``make(method)`` on this one object."""
        self._clean = False
        self._wrapped.append((target, name))
        own, method = target.__dict__.get(name, _MISSING), getattr(target, name)
        call = self._for_the_run(make(method), method)
        shadow = Owned.of(self, call, before=own, target=target, name=name)
        # Pipelines look at a method's signature to decide what to pass: without this, no generator.
        shadow.__wrapped__ = method
        target.__dict__[name] = shadow

    def beside(self, target: nn.Module, kind: type[T], make: Callable[[], T]) -> T:
        """Return what a port has put beside a module in this run, made when it is asked for first."""
        key = (id(target), kind)
        if key not in self._beside:
            self._beside[key] = make()
        found: T = self._beside[key]
        return found

    def hooked(self, method: Method) -> bool:
        """Whether anything is called before or after a method's calls now."""
        calls = self._calls.get((id(method.owner), method.name))
        return calls is not None and bool(calls.before or calls.after)

    def enter(self, mode: TorchFunctionMode) -> None:
        """Have a mode see every call of torch in this thread until the sweep."""
        self._clean = False
        self._modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def drop(self, owned: Owned) -> None:
        """Take one hook off."""
        if owned.table is not None and owned in owned.table:
            owned.table.remove(owned)
        if isinstance(owned.target, nn.Module):
            _remove(owned.target, lambda hook: hook is owned)

    def sweep(self) -> None:
        """Take off every hook, wrapped method and mode of this rig; safe to call again."""
        if self._clean:
            return
        drop_modes(self._modes)
        for module in self._modules:
            _remove(module, lambda hook: isinstance(hook, Owned) and hook.owner is self)
        for target, name in reversed(self._wrapped):
            current = target.__dict__.get(name)
            if isinstance(current, Owned) and current.owner is self:
                if current.before is _MISSING:
                    target.__dict__.pop(name, None)
                else:
                    target.__dict__[name] = current.before
        self._clean = True

    def forget(self) -> None:
        """Hold no hook any more, after the last sweep: hooks hold what their run kept, in a circle."""
        for calls in self._calls.values():
            for hook in (*calls.before, *calls.after):
                hook.table = None
            calls.before.clear()
            calls.after.clear()
        self._modules.clear()
        self._wrapped.clear()
        self._modes.clear()
        self._calls.clear()
        self._beside.clear()
        self.inside = None

    def _for_the_run(self, call: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
        """Return what is ``call`` for the run's own code, and ``other`` for the code beside it."""
        inside = self.inside
        if inside is None:
            return call
        return lambda *args, **kwargs: (call if inside() else other)(*args, **kwargs)

    def _calls_of(self, method: Method) -> _Calls:
        key = (id(method.owner), method.name)
        if key not in self._calls:
            calls = _Calls()
            self.wrap(method.owner, method.name, lambda call: calls.around(method.owner, call))
            self._calls[key] = calls
        return self._calls[key]

    def _keep_last(self, hooks: dict[int, Any]) -> None:
        for key, hook in list(hooks.items()):
            if isinstance(hook, Owned) and hook.owner is self and hook.last:
                hooks.move_to_end(key)  # type: ignore[attr-defined]


class _Calls:
    """The hooks around one method."""

    def __init__(self) -> None:
        self.before: list[Owned] = []
        self.after: list[Owned] = []

    def around(self, owner: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``method`` with the hooks around it; hooks may come and go while it is called."""

        def call(*args: Any, **kwargs: Any) -> Any:
            for hook in tuple(self.before):
                changed = hook(owner, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            output = method(*args, **kwargs)
            for hook in tuple(self.after):
                changed = hook(owner, args, kwargs, output)
                output = output if changed is None else changed
            return output

        return call


def _nothing(*_: Any) -> None:
    """A hook that leaves everything as it is."""


def _stand(owned: Owned, hooks: list[Owned]) -> Owned:
    """Put a hook among a method's, before those that stay last."""
    place = len(hooks) if owned.last else sum(not hook.last for hook in hooks)
    hooks.insert(place, owned)
    owned.table = hooks
    return owned


def _remove(module: nn.Module, ours: Callable[[Any], bool]) -> None:
    for table, companions in _HOOK_TABLES.items():
        hooks = getattr(module, table)
        for key in [key for key, hook in list(hooks.items()) if ours(hook)]:
            for companion in companions:
                getattr(module, companion).pop(key, None)
            hooks.pop(key, None)
