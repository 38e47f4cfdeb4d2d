"""Activation patching: one run's activation into another.

Vig et al. 2020 (arXiv:2004.12265); Meng et al. 2022 (arXiv:2202.05262).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workbench.errors import InputError, ShapeError
from workbench.interventions.intervention import Intervention
from workbench.tracing.ledger import ALL, GUIDED, Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site
from workbench.tracing.structure import describe


@dataclass(frozen=True)
class Patch(Intervention):
    """Put the source run's activation in place of this run's, step by step.

    Attributes:
        source: the run the activations come from; it must have captured the site.
    """

    source: Record = field(kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Check that the source can give what will be asked."""
        super().__post_init__()
        if not isinstance(self.source, Record):
            raise InputError(
                f"source={type(self.source).__name__} is no record. Make one: "
                f"source = model.record(prompt, capture=[{self.site!r}])"
            )
        if all(passage.call is None for passage in self.source.passages(self.site)):
            raise InputError(
                f"{self.site} passes outside the steps, where a patch by step cannot reach it. "
                "Replace its value in a block: with model.generate(prompt) as run: …"
            )
        for step in self.steps if isinstance(self.steps, tuple) else ():
            self.source.ledger.at(step)
        self.source.ledger.check_branch(self.branch)

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return the source's activation at the same step and branch, ``(rows, ...)``."""
        nth = self._nth(row, branch)
        found = self.source.at(site, step=row.step, branch=branch, nth=nth)
        if found.shape[1:] != value.shape[1:] or found.shape[0] not in (1, value.shape[0]):
            raise ShapeError(
                f"At {site}, step {row.step}, the source has {describe(found)} and the target "
                f"{describe(value)}. Run both at the same size and number of samples."
            )
        return found.to(value.device, value.dtype)

    def _nth(self, row: Row, branch: str) -> int:
        """Return which call of its step and branch ``row`` is, by its place among the step's ticks."""
        ticks = {each.tick for each in self.source.ledger.at(row.step, ALL if branch == GUIDED else branch)}
        return row.tick - min(ticks) if len(ticks) > 1 else 0
