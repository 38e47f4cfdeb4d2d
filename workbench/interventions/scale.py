"""Making an activation larger, smaller or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.interventions.intervention import Intervention, check_number
from workbench.interventions.patch import Patch
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site


@dataclass(frozen=True)
class Scale(Intervention):
    """Multiply an activation.

    Attributes:
        factor: by what; 1 changes nothing, not even a byte.
    """

    factor: float = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check that the factor is a number."""
        super().__post_init__()
        check_number("factor", self.factor)

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return the multiplied value, ``(rows, ...)``."""
        return value * self.factor


@dataclass(frozen=True)
class Ablate(Intervention):
    """Take away what an activation says: what then goes missing depended on it.

    A zero is not what the model is used to seeing there. A mean over other runs is, and so is what one of
    them has (Chan et al., 2022, causal scrubbing, call that resampling); noise of the same mean and
    deviation is the control for both.

    Attributes:
        how: ``"zero"``; ``"mean"``, of the references, at the same step and branch; ``"resample"``, one of
            them, drawn by the seed; ``"noise"``, normal, with the mean and deviation of each row.
        references: the runs to take a mean of or to draw from; they must have captured the site.
        seed: of what is drawn.
    """

    how: str = field(default="zero", kw_only=True)
    references: Sequence[Record] = field(default=(), kw_only=True, repr=False)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Check that there is what it needs."""
        super().__post_init__()
        if self.how not in HOW:
            raise UnknownNameError(f"how={self.how!r} is no way to ablate.{nearest(self.how, HOW)}")
        object.__setattr__(self, "references", tuple(self.references))
        if (self.how in ("mean", "resample")) != bool(self.references):
            raise InputError(
                f"how={self.how!r} with {len(self.references)} references: 'mean' and 'resample' take some, "
                "runs that captured the site, and the others none."
            )
        for each in self.references:
            self._from(each)

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return what stands for nothing, ``(rows, ...)``."""
        if self.how == "zero":
            return torch.zeros_like(value)
        if self.how == "noise":
            generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + row.call)
            noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            over = tuple(range(1, value.ndim))
            return value.mean(over, keepdim=True) + noise * value.std(over, keepdim=True)
        if self.how == "resample":
            chosen = self.references[drawn(self.seed, len(self.references))]
            return self._from(chosen).new_value(site, value, row, branch)
        found = [self._from(each).new_value(site, value, row, branch) for each in self.references]
        return torch.stack(found).mean(0)

    def _from(self, reference: Record) -> Patch:
        where = {name: getattr(self, name) for name in ("heads", "samples", "tokens")}
        return Patch(self.site, self.steps, self.branch, **where, source=reference)


HOW = ("zero", "mean", "resample", "noise")
"""Ways to ablate."""


def drawn(seed: int, count: int) -> int:
    """Return which of ``count`` references is drawn: one for the whole run, so that its steps fit."""
    return int(torch.randint(count, (), generator=torch.Generator("cpu").manual_seed(seed)))
