"""What a read returns: the value itself, with ``.save()``."""

from __future__ import annotations

from functools import cache
from typing import Any, SupportsIndex

import torch

from workbench.tracing.structure import map_tensors


class ReadTensor(torch.Tensor):
    """The tensor that is passing: it shares its storage, so editing it in place takes effect.

    Every operation on it returns plain tensors.

    Attributes:
        source: the tensor itself, as the model has it: the one that derivatives are taken by.
    """

    source: torch.Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute on plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return _plain(result)

    def save(self) -> torch.Tensor:
        """Return a copy that no later edit can change."""
        copy: torch.Tensor = plain(self).detach().clone()
        return copy


class ReadTuple(tuple[Any, ...]):
    """The tuple a module returned, with ``.save()``."""

    def save(self) -> tuple[Any, ...]:
        """Return a copy that no later edit can change."""
        return tuple(_copied(item) for item in self)


class ReadList(list[Any]):
    """The list a module returned, with ``.save()``; an item that is set is set in the module's own too.

    Attributes:
        source: the list itself, as the model has it.
    """

    source: list[Any]

    def __setitem__(self, index: SupportsIndex | slice, item: Any) -> None:
        """Put an item in place of another, also for the model."""
        self.source[index] = plain(item)
        super().__setitem__(index, item)

    def save(self) -> list[Any]:
        """Return a copy that no later edit can change."""
        return [_copied(item) for item in self]


def read(value: Any) -> Any:
    """Return ``value`` as handed to the user's block."""
    if isinstance(value, torch.Tensor):
        # Of layers split over ranks, what comes back may still be under way.
        arrived = value.trigger_wait() if hasattr(value, "trigger_wait") else value
        seen = arrived.as_subclass(ReadTensor)
        seen.source = value
        return seen
    if type(value) is tuple:
        return ReadTuple(read(item) for item in value)
    if type(value) is list:
        items = ReadList(read(item) for item in value)
        items.source = value
        return items
    if isinstance(value, dict):
        return _read_output(value)
    return value


def plain(value: Any) -> Any:
    """Return ``value`` as the model knows it, the reader's types taken off."""
    if isinstance(value, ReadTuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, ReadList):
        return [plain(item) for item in value]
    if isinstance(value, dict) and hasattr(value, "save"):
        return type(value).__mro__[1](**{key: plain(item) for key, item in value.items()})
    return map_tensors(value, _plain)


def _plain(value: Any) -> Any:
    return value.as_subclass(torch.Tensor) if isinstance(value, ReadTensor) else value


def _copied(value: Any) -> Any:
    return map_tensors(plain(value), lambda each: each.detach().clone())


def _read_output(value: dict[str, Any]) -> Any:
    """Give a model output ``.save()`` by a subclass made for its type."""
    return _with_save(type(value))(**{key: read(item) for key, item in value.items()})


@cache
def _with_save(kind: type[dict[str, Any]]) -> type[dict[str, Any]]:
    # Made once: torch keeps each class of model outputs for good.
    return type(kind.__name__, (kind,), {"save": _copied})
