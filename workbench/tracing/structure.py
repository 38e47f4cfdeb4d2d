"""Values as modules return them: a tensor, or tensors nested in tuples, lists, dicts and model outputs.

What an autoencoder's ``encode`` returns, a distribution, holds one tensor: its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from workbench.errors import ShapeError, UnknownNameError, nearest

Key = str | int
Leaf = tuple[Key, ...]

_PARAMETERS = "parameters"
"""The one tensor that a distribution is made of."""


def leaves(value: Any) -> Iterator[tuple[Leaf, torch.Tensor]]:
    """Yield ``(where, tensor)`` for each tensor in ``value``, depth first."""
    if isinstance(value, torch.Tensor):
        yield (), value
        return
    for key, item in (_parts(value) or {}).items():
        for rest, tensor in leaves(item):
            yield (key, *rest), tensor


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return ``value`` with ``change`` applied to each tensor, the structure kept."""
    if isinstance(value, torch.Tensor):
        return change(value)
    parts = _parts(value)
    return value if parts is None else _with(value, {key: map_tensors(parts[key], change) for key in parts})


def keep(value: Any) -> Any:
    """Return a copy of ``value`` on the CPU that no later in-place edit can change."""
    if type(value) is torch.Tensor:
        return keep_tensor(value)  # as nearly always, and thousands of times a run
    if type(value) is tuple:
        return tuple(keep(item) for item in value)
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
    return _with(value, {**(_parts(value) or {}), _key_of(value, head): changed})


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
            value = (_parts(value) or {})[_key_of(value, key)]
        except (KeyError, IndexError):
            names = [spell((*leaf[:depth], *rest)) for rest, _ in leaves(value)]
            raise UnknownNameError(
                f"{site} has no part {spell(leaf[: depth + 1])!r}.{nearest(spell(leaf), names)}"
            ) from None
    return value


def _key_of(value: Any, key: Key) -> Key:
    """Positions reach into a mapping too, since a model output is both; from the end, too."""
    return list(_parts(value) or {})[key] if isinstance(key, int) else key


def _choices(site: str, found: Sequence[tuple[Leaf, torch.Tensor]]) -> str:
    return ", ".join(f"{site}{spell(leaf)} {describe(tensor)}" for leaf, tensor in found) or "none"


def _parts(value: Any) -> dict[Any, Any] | None:
    """Return what a value is made of, by key or position; None if it is no structure."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    return {_PARAMETERS: value.parameters} if _is_distribution(value) else None


def _with(value: Any, parts: dict[Any, Any]) -> Any:
    """Return a value made anew of other parts."""
    if type(value) is dict:
        return parts
    if isinstance(value, Mapping):
        return type(value)(**parts)
    if isinstance(value, (tuple, list)):
        items = parts.values()
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    parameters = parts[_PARAMETERS]
    if parameters is value.parameters:
        return value
    fixed = getattr(value, "deterministic", None)
    return type(value)(parameters) if fixed is None else type(value)(parameters, deterministic=fixed)


def _is_distribution(value: Any) -> bool:
    """Whether a value is of what diffusers' autoencoders encode to, which derive all from one tensor."""
    return isinstance(getattr(value, _PARAMETERS, None), torch.Tensor)
