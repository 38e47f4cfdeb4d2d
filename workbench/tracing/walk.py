"""``run.steps``: the steps of a run in a block, one after the other."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, SupportsIndex

from workbench.errors import InputError, OutOfOrderError
from workbench.tracing.ledger import Row

if TYPE_CHECKING:
    from workbench.tracing.trace import Trace

Chosen = SupportsIndex | slice | Iterable[SupportsIndex]


class Steps:
    """``run.steps``: iterate over all, or over what an index, slice or list chooses."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def __iter__(self) -> Iterator[Row]:
        return self._over(slice(None))

    def __getitem__(self, chosen: Chosen) -> Iterator[Row]:
        """Iterate over the chosen steps, in order.

        Raises:
            InputError: steps that the run does not have, that run backwards, or what is no step.
            OutOfOrderError: the run is past a step; it is met while iterating.
        """
        return self._over(chosen)

    def _over(self, chosen: Chosen) -> Iterator[Row]:
        total = self._trace.known_steps()
        wanted = chosen if isinstance(chosen, slice) else _listed(chosen)
        rows = self._as_they_come(wanted) if total is None else self._known(wanted, total)
        at = None
        try:
            for row in rows:
                at = row.step
                yield row
        finally:
            # Also after a break, which closes this generator.
            self._trace.leave_step(at)

    def _known(self, chosen: slice | list[int], total: int) -> Iterator[Row]:
        wanted = self._numbers(chosen, total)
        if any(later <= earlier for earlier, later in pairwise(wanted)):
            raise InputError(f"steps[{chosen}] does not go forward; a run cannot go back. Sort the steps.")
        for step in wanted:
            if self._trace.stopped:
                return
            yield self._trace.go_to_step(step)

    def _as_they_come(self, chosen: slice | list[int]) -> Iterator[Row]:
        """Go on without knowing how many steps there will be: a later stage is still to come."""
        wanted: Iterable[int]
        if isinstance(chosen, slice):
            first, stride = chosen.start or 0, chosen.step or 1
            wanted = count(first, stride) if chosen.stop is None else range(first, chosen.stop, stride)
            named = [first, chosen.stop or 0, stride]
        else:
            wanted = named = chosen
        if min(named, default=0) < 0:
            raise InputError(
                f"steps[{chosen}] counts from the end or backwards, and this run does not know its end "
                "before its last stage. Count from 0; the first stage's steps come first."
            )
        for step in wanted:
            if self._trace.stopped:
                return
            if isinstance(chosen, slice) and self._is_over(step):
                return
            try:
                row = self._trace.go_to_step(step)
            except OutOfOrderError:
                if isinstance(chosen, slice) and self._is_over(step):
                    return
                raise
            yield row

    def _is_over(self, step: int) -> bool:
        """Whether the run has ended before ``step``."""
        return self._trace.ended and step >= self._trace.record.ledger.steps

    def _numbers(self, chosen: slice | list[int], total: int) -> list[int]:
        if isinstance(chosen, slice):
            return list(range(*chosen.indices(total)))
        for number in chosen:
            if not -total <= number < total:
                raise InputError(f"The run has {total} steps (0 to {total - 1}); {number} is none of them.")
        return [number % total for number in chosen]


def _listed(chosen: Any) -> list[int]:
    """Return a step, or several, as plain integers, whatever library's numbers they are."""
    try:
        return [operator.index(chosen)]
    except TypeError:
        pass
    try:
        return [operator.index(each) for each in chosen]
    except TypeError:
        raise InputError(
            f"steps[{chosen!r}] does not name steps. Give a number, a slice like 2:5 or a list of numbers."
        ) from None
