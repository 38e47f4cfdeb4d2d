"""A run with the activations that are asked of it, within a budget of memory."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.tracing.record import Record
from workbench.tracing.session import Listener
from workbench.tracing.structure import leaves


class Kept:
    """A run whose activations are captured as they are needed, and let go of where there is no room.

    Args:
        record: the run, without captures; it is run again for them, to the byte.
        start: the step from which on they are needed.
        budget: bytes that they may take.
        listener: told how those runs go on.

    Attributes:
        record: the run, with what is held.
    """

    def __init__(self, record: Record, start: int, budget: int, listener: Listener | None = None) -> None:
        self.record = record
        self._start, self._budget, self._listener = start, budget, listener
        self._largest = 0

    @property
    def room(self) -> int:
        """How many sites can be held at once, at least one, judged by the largest seen."""
        return max(1, self._budget // self._largest) if self._largest else 1

    def holding(self, sites: Sequence[str], ahead: Sequence[str] = ()) -> Record:
        """Return the run with the activations of some sites.

        Args:
            sites: which must be there.
            ahead: which will be needed next, in that order; as many as there is room for are captured along.
        """
        captured = self.record.captured
        if all(site in captured for site in sites):
            return self.record
        wanted = list(dict.fromkeys([*sites, *ahead]))[: max(len(sites), self.room)]
        for site in [site for site in captured if site not in wanted]:
            del captured[site]
        lacking = [site for site in wanted if site not in captured]
        again = self.record.fork(self._start, capture=lacking, listener=self._listener)
        for site in lacking:
            captured[site] = again.captured[site]
            size = sum(
                tensor.numel() * tensor.element_size()
                for passage in captured[site]
                for _, tensor in leaves(passage.value)
            )
            self._largest = max(self._largest, size)
        return self.record
