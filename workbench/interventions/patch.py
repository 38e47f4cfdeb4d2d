"""Activation patching: one run's activation into another.

Vig et al. 2020 (arXiv:2004.12265); Meng et al. 2022 (arXiv:2202.05262).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workbench.errors import InputError, ShapeError
from workbench.interventions.intervention import Intervention, Places, numbers
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
        from_site: where in the source they come from; None is the same place.
        from_step: the step of the source whose activations go into every step, in its first call; None is
            the same step.
        from_tokens: which places of the source's sequence go into ``tokens``, one for each or one for all;
            None is the same places.
    """

    source: Record = field(kw_only=True, repr=False)
    from_site: str | None = field(default=None, kw_only=True)
    from_step: int | None = field(default=None, kw_only=True)
    from_tokens: Places = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check that the source can give what will be asked."""
        super().__post_init__()
        if not isinstance(self.source, Record):
            raise InputError(
                f"source={type(self.source).__name__} is no record. Make one: "
                f"source = model.record(prompt, capture=[{self.site!r}])"
            )
        if all(passage.call is None for passage in self.source.passages(self._origin)):
            raise InputError(
                f"{self._origin} passes outside the steps, where a patch by step cannot reach it. "
                "Replace its value in a block: with model.generate(prompt) as run: …"
            )
        for step in self.steps if isinstance(self.steps, tuple) and self.from_step is None else ():
            self.source.ledger.at(step)
        if self.from_step is not None:
            self.source.ledger.at(self.from_step)
        if self.from_tokens is not None:
            if self.tokens is None:
                raise InputError(f"from_tokens={self.from_tokens!r} needs tokens: where they go.")
            if not callable(self.from_tokens):
                object.__setattr__(self, "from_tokens", numbers("from_tokens", self.from_tokens))
        self.source.ledger.check_branch(self.branch)

    @property
    def _origin(self) -> str:
        return self.site if self.from_site is None else self.from_site

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return the source's activation of the step and branch, ``(rows, ...)``."""
        if branch != GUIDED and branch not in self.source.ledger.branches:
            raise InputError(
                f"At {site}, step {row.step}, the run has a branch {branch!r} and the source has "
                f"{', '.join(self.source.ledger.branches)} alone. Say which to patch, "
                f"branch={self.source.ledger.branches[-1]!r}, or run both with guidance."
            )
        step = row.step if self.from_step is None else self.from_step
        nth = nth_call(self.source, row, branch) if self.from_step is None else 0
        found = self._for_samples(self.source.at(self._origin, step=step, branch=branch, nth=nth), value, row)
        origin = Site.parse(self._origin)
        found = found[self.place(origin, found, self.from_tokens)]
        if self.from_tokens is not None and found.ndim == value.ndim and found.shape[-2] == 1:
            found = found.expand_as(value)
        if found.shape != value.shape:
            elsewhere = Site.parse(self._origin) != site
            there = f" at {self._origin}" if elsewhere else ""
            instead = (
                f"Take a from_site whose values have that shape; None is {site} itself."
                if elsewhere
                else "Run both at the same size and number of samples, and choose as many places in both."
            )
            raise ShapeError(
                f"At {site}, step {row.step}, the source has {describe(found)}{there} and the target "
                f"{describe(value)}. {instead}"
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
