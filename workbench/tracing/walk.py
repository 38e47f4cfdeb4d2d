"""``run.steps``: the steps of a run in a block, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count, pairwise
from typing import TYPE_CHECKING

from workbench.errors import InputError, OutOfOrderError
from workbench.tracing.ledger import Row

if TYPE_CHECKING:
    from workbench.tracing.trace import Trace


class Steps:
    """``run.steps``: iterate over all, or over what an index, slice or list chooses."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __iter__(self) -> Iterator[Row]:
        return self._over(slice(None))

    def __getitem__(self, chosen: int | slice | list[int]) -> Iterator[Row]:
        """Iterate over the chosen steps, in order.

        Raises:
            InputError: steps that the run does not have, or that run backwards.
        """
        return self._over(chosen)

    def _over(self, chosen: int | slice | list[int]) -> Iterator[Row]:
        total = self._trace.known_steps()
        if total is None:
            yield from self._as_they_come(chosen)
            return
        wanted = self._numbers(chosen, total)
        if any(later <= earlier for earlier, later in pairwise(wanted)):
            raise InputError(f"steps[{chosen}] does not go forward; a run cannot go back. Sort the steps.")
        for step in wanted:
            if self._trace.stopped:
                return
            yield self._trace.go_to_step(step)
        self._trace.leave_steps()

    def _as_they_come(self, chosen: int | slice | list[int]) -> Iterator[Row]:
        """Go on without knowing how many steps there will be: a later stage is still to come."""
        wanted: Iterable[int]
        if isinstance(chosen, slice):
            wanted = count(chosen.start or 0, chosen.step or 1)
            named = [chosen.start or 0, chosen.stop or 0, chosen.step or 1]
        else:
            wanted = named = [chosen] if isinstance(chosen, int) else list(chosen)
        if min(named, default=0) < 0:
            raise InputError(
                f"steps[{chosen}] counts from the end or backwards, and this run does not know its end "
                "before its last stage. Count from 0; the first stage's steps come first."
            )
        for step in wanted:
            if self._trace.stopped:
                return
            if isinstance(chosen, slice) and chosen.stop is not None and step >= chosen.stop:
                break
            try:
                row = self._trace.go_to_step(step)
            except OutOfOrderError:
                if isinstance(chosen, slice) and self._trace.ended:
                    break
                raise
            yield row
        self._trace.leave_steps()

    def _numbers(self, chosen: int | slice | list[int], total: int) -> list[int]:
        if isinstance(chosen, slice):
            return list(range(*chosen.indices(total)))
        numbers = [chosen] if isinstance(chosen, int) else list(chosen)
        for number in numbers:
            if not -total <= number < total:
                raise InputError(f"The run has {total} steps (0 to {total - 1}); {number} is none of them.")
        return [number % total for number in numbers]
