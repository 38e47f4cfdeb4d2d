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


@dataclass
class _Calls:
    """Maps of one layer's calls, written into memory taken once: joined at the end they would be twice.

    Attributes:
        values: ``(room, [heads,] tokens, places)``.
        count: how many there are.
    """

    values: torch.Tensor
    count: int = 0

    def add(self, value: torch.Tensor) -> None:
        if self.count == len(self.values):
            more = torch.empty_like(self.values)
            self.values = torch.cat([self.values, more])
        self.values[self.count] = value
        self.count += 1


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
    whole: dict[str, _Calls] = field(default_factory=dict)

    def key(self, path: str, call: int, shape: tuple[int, ...]) -> Key:
        """Return what a map is added up with."""
        return (None if "layers" in self.how else path, None if "steps" in self.how else call, shape)

    def add(self, path: str, row: Row, value: torch.Tensor, calls: int = 1) -> None:
        """Take one layer's map of one call, ``([heads,] tokens, places)`` float32, of about so many calls."""
        if not self.how:
            if path not in self.whole:
                self.whole[path] = _Calls(torch.empty(max(calls, 1), *value.shape, dtype=self.dtype))
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
        """Return ``(calls, [heads,] tokens, places)`` by layer; what is reduced has length 1 or one name."""
        if not self.how:
            return {path: calls.values[: calls.count] for path, calls in self.whole.items()}
        by_layer: dict[str, dict[int, list[_Sum]]] = {}
        for (path, call, _), found in self.kept.items():
            calls = by_layer.setdefault(path or ALL_LAYERS, {})
            calls.setdefault(-1 if call is None else call, []).append(found)
        return {
            path: torch.stack([self._whole(sums).to(self.dtype) for _, sums in sorted(calls.items())])
            for path, calls in by_layer.items()
        }

    def _whole(self, sums: list[_Sum]) -> torch.Tensor:
        """Return the mean or maximum of what was added up in several shapes."""
        finest = max(sums, key=lambda each: each.value.shape[-1]).value.shape[-1]
        values = [_to_grid(each.value, finest, self.aspect) for each in sums]
        if next(iter(self.how.values())) == "max":
            return torch.stack(values).amax(0)
        return torch.stack(values).sum(0) / sum(each.count for each in sums)


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
