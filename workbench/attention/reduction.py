"""Adds attention maps up as they come, so that what is reduced away is never held."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from workbench.attention.geometry import grid
from workbench.errors import InputError
from workbench.tracing.ledger import Row

ALL_LAYERS = "all layers"
"""The name of the one layer that is left where layers are reduced."""

Key = tuple[str | None, int | None, tuple[int, ...]]
"""What is added up together: one layer or all (None), one call or all, one shape."""


@dataclass
class _Sum:
    value: torch.Tensor
    count: int = 1


class Calls:
    """Values of one layer's calls, written into memory taken once: joined at the end they would be twice.

    Args:
        like: the first of them, ``([heads,] tokens, places)``.
        calls: of about how many calls they will be.
        dtype: as what they are kept.
    """

    def __init__(self, like: torch.Tensor, calls: int, dtype: torch.dtype) -> None:
        self._room = torch.empty(max(calls, 1), *like.shape, dtype=dtype)
        self._count = 0

    def add(self, value: torch.Tensor) -> None:
        """Keep one call's."""
        if self._count == len(self._room):
            self._room = torch.cat([self._room, torch.empty_like(self._room)])
        self._room[self._count] = value
        self._count += 1

    @property
    def values(self) -> torch.Tensor:
        """Those of all calls, ``(calls, [heads,] tokens, places)``."""
        return self._room[: self._count]


@dataclass
class Reduction:
    """Keeps maps by layer and call, or their mean or maximum over layers, steps or both.

    Attributes:
        how: ``"mean"`` or ``"max"`` by the axes that go, of ``"layers"`` and ``"steps"``.
        dtype: of what is kept; what is added up is float32 until the end.
        aspect: the picture's ``(width, height)``, by which maps of several layers are brought to one grid.
    """

    how: Mapping[str, str]
    dtype: torch.dtype
    aspect: tuple[int, int] = (1, 1)
    kept: dict[Key, _Sum] = field(default_factory=dict)
    whole: dict[str, Calls] = field(default_factory=dict)

    def key(self, path: str, call: int, shape: tuple[int, ...]) -> Key:
        """Return what a map is added up with."""
        return (None if "layers" in self.how else path, None if "steps" in self.how else call, shape)

    def add(self, path: str, row: Row, value: torch.Tensor, calls: int = 1) -> None:
        """Take one layer's map of one call, ``([heads,] tokens, places)`` float32, of about so many calls."""
        if not self.how:
            if path not in self.whole:
                self.whole[path] = Calls(value, calls, self.dtype)
            self.whole[path].add(value)
            return
        key = self.key(path, row.call, tuple(value.shape))
        found = self.kept.get(key)
        if found is None:
            self.kept[key] = _Sum(value.to("cpu", copy=True))
            return
        how = next(iter(self.how.values()))
        value = value.to(found.value.device)
        if how == "mean":
            found.value += value
        else:
            torch.maximum(found.value, value, out=found.value)
        found.count += 1

    def result(self) -> dict[str, torch.Tensor]:
        """Return ``(calls, [heads,] tokens, places)`` by layer; what is reduced has length 1 or one name.

        What was kept goes into it: there is not twice as much at any time.
        """
        if not self.how:
            return {path: calls.values for path, calls in self.whole.items()}
        by_layer: dict[str, dict[int, list[_Sum]]] = {}
        for (path, call, _), found in self.kept.items():
            calls = by_layer.setdefault(path or ALL_LAYERS, {})
            calls.setdefault(-1 if call is None else call, []).append(found)
        self.kept.clear()
        return {path: self._joined(by_layer.pop(path)) for path in list(by_layer)}

    def _joined(self, calls: dict[int, list[_Sum]]) -> torch.Tensor:
        """Return what was added up of each call, in their order."""
        joined: Calls | None = None
        for call in sorted(calls):
            whole = self._whole(calls.pop(call))
            if joined is None and not calls:
                return whole.to(self.dtype)[None]
            joined = joined or Calls(whole, len(calls) + 1, self.dtype)
            joined.add(whole)
        assert joined is not None
        return joined.values

    def _whole(self, sums: list[_Sum]) -> torch.Tensor:
        """Return the mean or maximum of what was added up in several shapes, in the memory of the sums."""
        count = sum(each.count for each in sums)
        finest = max(each.value.shape[-1] for each in sums)
        whole = _to_grid(sums.pop(0).value, finest, self.aspect)
        mean = next(iter(self.how.values())) == "mean"
        while sums:
            value = _to_grid(sums.pop(0).value, finest, self.aspect)
            whole = whole.add_(value) if mean else torch.maximum(whole, value, out=whole)
        return whole.div_(count) if mean else whole


def _to_grid(value: torch.Tensor, places: int, aspect: tuple[int, int]) -> torch.Tensor:
    """Resize ``(…, tokens, places)`` bilinearly to a grid of as many places."""
    if value.shape[-1] == places:
        return value
    old, new = grid(value.shape[-1], *aspect), grid(places, *aspect)
    if old is None or new is None:
        raise InputError(
            f"Maps of {value.shape[-1]} and {places} places do not lie on one picture, so layers cannot be "
            "reduced together. Leave 'layers' out of reduce, or choose sites of one size."
        )
    flat = value.reshape(1, -1, *old)
    resized = functional.interpolate(flat, size=new, mode="bilinear", align_corners=False)
    return resized.reshape(*value.shape[:-1], places)
