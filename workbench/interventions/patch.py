"""Activation patching: one run's activation into another.

Vig et al. 2020 (arXiv:2004.12265); Meng et al. 2022 (arXiv:2202.05262).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workbench.errors import InputError, ShapeError
from workbench.interventions.intervention import Intervention, check_heads
from workbench.tracing.ledger import ALL, GUIDED, Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site
from workbench.tracing.structure import describe


@dataclass(frozen=True)
class Patch(Intervention):
    """Put the source run's activation in place of this run's, step by step.

    A source of one sample goes into each chosen sample of this run; a source of as many samples as this
    run gives each its own.

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
        nth = nth_call(self.source, row, branch)
        found = self._for_samples(self.source.at(site, step=row.step, branch=branch, nth=nth), value, row)
        if self.heads is not None:
            found = found[:, check_heads(self.heads, found.shape[1], site=str(site))]
        if found.shape != value.shape:
            raise ShapeError(
                f"At {site}, step {row.step}, the source has {describe(found)} and the target "
                f"{describe(value)}. Run both at the same size and number of samples."
            )
        return found.to(value.device, value.dtype)

    def _for_samples(self, found: torch.Tensor, value: torch.Tensor, row: Row) -> torch.Tensor:
        """Return what the source has for the rows of ``value``."""
        made = self.source.ledger[0].samples
        if self.samples is not None and made == row.samples:
            return found[row.rows_of(self.samples, len(found))]  # type: ignore[arg-type]
        alone = made == 1 or len(found) == 1
        if alone and len(value) % len(found) == 0:
            return found.repeat(len(value) // len(found), *[1] * (found.ndim - 1))
        return found


def nth_call(source: Record, row: Row, branch: str) -> int:
    """Return which of the source's calls of its step and branch ``row`` is, by its place among the ticks."""
    ticks = {each.tick for each in source.ledger.at(row.step, ALL if branch == GUIDED else branch)}
    return row.tick - min(ticks) if len(ticks) > 1 else 0
