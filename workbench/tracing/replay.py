"""Recorded outputs in place of the denoiser, up to a step.

The pipeline itself runs: its scheduler, the scheduler's history and every generator go through the
states they had, so what follows is exact for any pipeline and scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from workbench.errors import InputError, ShapeError
from workbench.tracing.clock import Clock
from workbench.tracing.ledger import Row
from workbench.tracing.record import Passage, Record
from workbench.tracing.rig import Rig
from workbench.tracing.sites import Site
from workbench.tracing.structure import describe, map_tensors


@dataclass
class Replay:
    """Stand-in for the denoiser before ``until``.

    Attributes:
        record: the run to repeat.
        until: the first step that is computed.
    """

    record: Record
    until: int

    def covers(self, row: Row) -> bool:
        """Whether ``row`` is repeated."""
        return row.step < self.until

    @contextmanager
    def global_noise(self) -> Iterator[None]:
        """Give the run torch's global generator as the recorded one had it, and the caller theirs back."""
        if self.record.rng_state is None:
            yield
            return
        state = torch.get_rng_state()
        torch.set_rng_state(self.record.rng_state)
        try:
            yield
        finally:
            torch.set_rng_state(state)

    def attach(self, rig: Rig, clock: Clock) -> None:
        """Shadow each denoiser's forward, and hand the scheduler the recorded guided prediction."""
        for module in clock.system.denoisers.values():
            rig.wrap(module, "forward", lambda forward: self._standing_in(clock, forward))
        clock.guided, clock.left = self._guided, self._left

    def passages(self, site: Site) -> list[Passage]:
        """Return what the repeated steps left at ``site``, if the recorded run kept all of it."""
        return self.early(site) if self.record.asked(str(site)) is None else []

    def early(self, site: Site) -> list[Passage]:
        """Return what the recorded run kept at ``site`` in the repeated steps, as it kept it."""
        kept = self.record.captured.get(str(site), [])
        early = {row.call for row in self.record.ledger if self.covers(row)}
        return [each for each in kept if each.call in early]

    def _standing_in(self, clock: Clock, forward: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            row = clock.row
            if row is None or not self.covers(row):
                return forward(*args, **kwargs)
            return self._recorded(row, args, kwargs)

        return stand_in

    def _recorded(self, row: Row, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sample = args[0] if args else next(iter(kwargs.values()))
        match = self._match(row)
        output = self.record.calls[match.call]
        if isinstance(sample, (list, tuple)):
            if match.branches != row.branches:
                raise InputError(
                    f"Guidance cannot be switched on or off in a fork of this model ({row.component} takes "
                    f"its samples as a list): the run computes {match.branch}, the fork {row.branch}."
                )
            return map_tensors(output, lambda tensor: tensor.to(sample[0].device, copy=True))
        size = _batch(output)
        rows = sample.shape[0] if isinstance(sample, torch.Tensor) else size
        if match.branches == row.branches and size == rows:
            return map_tensors(output, lambda tensor: tensor.to(sample.device, copy=True))
        # Guidance was switched on or off: only the shape matters, the scheduler gets the recorded
        # guided prediction.
        return map_tensors(
            output, lambda tensor: tensor[:1].expand(rows, *tensor.shape[1:]).to(sample.device, copy=True)
        )

    def _match(self, row: Row) -> Row:
        same = [each for each in self.record.ledger if each.tick == row.tick]
        alike = [each for each in same if each.branches == row.branches and each.component == row.component]
        return (alike or same)[0]

    def _guided(self, tick: int, step: int, computed: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        if step >= self.until:
            return computed
        recorded, left = self.record.ticks[tick]["noise_pred"], self.record.ticks[tick]["latents"]
        assert recorded is not None
        assert left is not None
        if left.shape != latents.shape:
            raise ShapeError(
                f"The recorded run made samples of {describe(left)}, this one asks for {describe(latents)}. "
                "A fork keeps the size and the number of samples."
            )
        return recorded.to(computed.device, computed.dtype)

    def _left(self, tick: int, step: int) -> torch.Tensor | None:
        """Return the latents that a repeated step left: an edit may have changed what the scheduler made."""
        return self.record.ticks[tick]["latents"] if step < self.until else None


def _batch(output: Any) -> int:
    sizes: list[int] = []
    map_tensors(output, lambda tensor: sizes.append(tensor.shape[0]) or tensor)  # type: ignore[func-returns-value]
    return sizes[0]
