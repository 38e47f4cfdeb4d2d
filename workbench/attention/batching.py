"""Computes the weights of like layers' calls at once: of small ones, ten take as long as one."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import torch

from workbench.attention.request import Attention
from workbench.attention.softmax import Places, weights
from workbench.tracing.ledger import Row

ROOM = 1 << 20
"""Bytes of all queries and keys that may wait to be computed with later ones, and of one batch's weights."""


@dataclass(frozen=True)
class Wanted:
    """What is wanted of a call's weights, and how the layer makes them.

    Attributes:
        queries: which queries.
        columns: which keys.
        scale: of the dot products; None is 1/√width.
        mask: of the one sample.
    """

    queries: Places
    columns: Places
    scale: float | None = None
    mask: torch.Tensor | None = None


@dataclass
class Batch:
    """Calls of layers alike, whose weights are computed at once.

    Attributes:
        wanted: what is wanted of each.
        calls: each layer and call.
        query: of each, ``(1, heads, queries, width)``.
        key: of each, ``(1, heads, keys, width)``.
    """

    wanted: Wanted
    calls: list[tuple[str, Row]] = field(default_factory=list)
    query: list[torch.Tensor] = field(default_factory=list)
    key: list[torch.Tensor] = field(default_factory=list)

    def computed(self, asked: Attention) -> Iterator[tuple[str, Row, torch.Tensor]]:
        """Compute, once, and give each layer, call and ``([heads,] queries, columns)`` of weights."""
        query, key = (some[0] if len(some) == 1 else torch.cat(some) for some in (self.query, self.key))
        self.query.clear()
        self.key.clear()
        with torch.autocast(query.device.type, enabled=False):
            values = weights(
                query,
                key,
                queries=self.wanted.queries,
                columns=self.wanted.columns,
                heads=asked.heads,
                over_heads=asked.over_heads,
                scale=self.wanted.scale,
                mask=self.wanted.mask,
            )
        for (path, row), value in zip(self.calls, values, strict=True):
            yield path, row, value


class Batches:
    """Takes calls as they come, and returns them as batches, of each layer in their order."""

    def __init__(self) -> None:
        self._batches: dict[Hashable, Batch] = {}
        self._kinds: dict[str, Hashable] = {}
        self._held = 0

    def add(self, path: str, row: Row, query: torch.Tensor, key: torch.Tensor, wanted: Wanted) -> list[Batch]:
        """Let a call wait for others if it can; return what is to be computed now.

        Args:
            path: the layer.
            row: the call.
            query: ``(1, heads, queries, width)``.
            key: ``(1, heads, keys, width)``.
            wanted: what of their weights.
        """
        held = query.nbytes + key.nbytes
        size = 8 * query.shape[1] * query.shape[2] * key.shape[2]  # before and after the softmax
        places = (_spelled(wanted.queries), _spelled(wanted.columns))
        kind = (query.shape, key.shape, query.device, wanted.scale, *places)
        alone = wanted.mask is not None or max(held, size) > ROOM
        due: list[Batch] = []
        if path in self._kinds and (alone or self._kinds[path] != kind):
            due = self.rest()
        if alone:
            return [*due, Batch(wanted, [(path, row)], [query], [key])]
        batch = self._batches.get(kind)
        if self._held + held > ROOM or (batch is not None and (len(batch.calls) + 1) * size > ROOM):
            due, batch = self.rest(), None
        if batch is None:
            batch = self._batches[kind] = Batch(wanted)
        self._kinds[path] = kind
        self._held += held
        batch.calls.append((path, row))
        # The layer may write others into the same memory.
        batch.query.append(query.clone())
        batch.key.append(key.clone())
        return due

    def rest(self) -> list[Batch]:
        """Return all that waits."""
        due, self._held = list(self._batches.values()), 0
        self._batches.clear()
        self._kinds.clear()
        return due


def _spelled(places: Places) -> Hashable:
    if isinstance(places, slice):
        return (places.start, places.stop, places.step)
    return tuple(places.tolist())
