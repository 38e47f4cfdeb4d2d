"""Values as modules return them: a tensor, or tensors nested in tuples, lists, dicts and model outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from workbench.errors import ShapeError, UnknownNameError, nearest

Key = str | int
Leaf = tuple[Key, ...]


def leaves(value: Any) -> Iterator[tuple[Leaf, torch.Tensor]]:
    """Yield ``(where, tensor)`` for each tensor in ``value``, depth first."""
    if isinstance(value, torch.Tensor):
        yield (), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            for rest, tensor in leaves(item):
                yield (key, *rest), tensor
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            for rest, tensor in leaves(item):
                yield (index, *rest), tensor


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return ``value`` with ``change`` applied to each tensor, the structure kept."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _like_mapping(value, {key: map_tensors(item, change) for key, item in value.items()})
    if isinstance(value, (tuple, list)):
        return _like_sequence(value, [map_tensors(item, change) for item in value])
    return value


def keep(value: Any) -> Any:
    """Return a copy of ``value`` on the CPU that no later in-place edit can change."""
    if type(value) is torch.Tensor:
        return keep_tensor(value)  # as nearly always, and thousands of times a run
    return map_tensors(value, keep_tensor)


def keep_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a detached copy on the CPU, strides preserved."""
    plain = tensor.detach()
    return plain.clone() if plain.is_cpu else plain.to("cpu")


def spell(leaf: Leaf) -> str:
    """Spell a leaf as in a site: ``[1]``, ``.sample``, ``[1].hidden``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in leaf)


def pick(value: Any, leaf: Leaf, *, site: str) -> Any:
    """Return the part of ``value`` that ``leaf`` selects; without a selector, its only tensor.

    Raises:
        ShapeError: there are several tensors (or none) and no selector says which.
        UnknownNameError: the selector picks nothing.
    """
    if leaf:
        return _descend(value, leaf, site)
    if isinstance(value, torch.Tensor):
        return value
    found = list(leaves(value))
    if len(found) == 1:
        return found[0][1]
    raise ShapeError(f"{site} holds {len(found)} tensors, so say which one: {_choices(site, found)}")


def put(value: Any, leaf: Leaf, new: Any, *, site: str) -> Any:
    """Return ``value`` with the part that ``leaf`` selects replaced by ``new``."""
    if not leaf:
        if isinstance(value, torch.Tensor) or not isinstance(new, torch.Tensor):
            return new
        found = list(leaves(value))
        if len(found) != 1:
            raise ShapeError(f"{site} holds {len(found)} tensors, so say which one: {_choices(site, found)}")
        leaf = found[0][0]
    head, rest = leaf[0], leaf[1:]
    part = _descend(value, (head,), site)
    changed = put(part, rest, new, site=site) if rest else new
    if isinstance(value, Mapping):
        items = dict(value)
        items[_key_of(value, head)] = changed
        return _like_mapping(value, items)
    entries = list(value)
    entries[int(head)] = changed
    return _like_sequence(value, entries)


def check_fit(old: Any, new: Any, *, site: str) -> None:
    """Refuse a replacement whose tensors differ in place, shape or dtype from those they replace.

    A tensor may stand for a structure that holds just one.

    Raises:
        ShapeError: both shapes and dtypes are printed.
    """
    if isinstance(new, torch.Tensor):
        old = pick(old, (), site=site)
    if _forms(old) != _forms(new):
        raise ShapeError(
            f"{site} is {describe(old)}; the replacement is {describe(new)}. They must be alike in shape and "
            "dtype: new.expand_as(old).to(old.dtype)."
        )


def describe(value: Any) -> str:
    """Spell a value's shape and dtype, as ``(2, 77, 96) float32``; of a structure, each tensor's."""
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    found = [f"{spell(leaf)} {describe(tensor)}" for leaf, tensor in leaves(value)]
    return f"{type(value).__name__} of " + ", ".join(found) if found else type(value).__name__


def _forms(value: Any) -> dict[Leaf, tuple[torch.Size, torch.dtype]]:
    return {leaf: (tensor.shape, tensor.dtype) for leaf, tensor in leaves(value)}


def _descend(value: Any, leaf: Leaf, site: str) -> Any:
    for depth, key in enumerate(leaf):
        try:
            value = value[_key_of(value, key)]
        except (KeyError, IndexError, TypeError):
            names = [spell((*leaf[:depth], *rest)) for rest, _ in leaves(value)]
            raise UnknownNameError(
                f"{site} has no part {spell(leaf[: depth + 1])!r}.{nearest(spell(leaf), names)}"
            ) from None
    return value


def _key_of(value: Any, key: Key) -> Key:
    """Positions reach into a mapping too: a model output is both."""
    if isinstance(value, Mapping) and isinstance(key, int):
        return cast(Key, list(value)[key])
    return key


def _choices(site: str, found: Sequence[tuple[Leaf, torch.Tensor]]) -> str:
    return ", ".join(f"{site}{spell(leaf)} {describe(tensor)}" for leaf, tensor in found) or "none"


def _like_mapping(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    return items if type(value) is dict else type(value)(**items)


def _like_sequence(value: Sequence[Any], items: list[Any]) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items)  # type: ignore[call-arg]
