"""Making an activation larger, smaller or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.interventions.intervention import Intervention, Places, check_number
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
        reference_tokens: which places of each reference's sequence go into ``tokens``; none is the same.
        seed: of what is drawn.
    """

    how: str = field(default="zero", kw_only=True)
    references: Sequence[Record] = field(default=(), kw_only=True, repr=False)
    reference_tokens: Sequence[Places] = field(default=(), kw_only=True, repr=False)
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
        if self.reference_tokens and len(self.reference_tokens) != len(self.references):
            raise InputError("reference_tokens are of the references: give one for each, or none.")
        for number in range(len(self.references)):
            self._from(number)

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
            return self._from(drawn(self.seed, len(self.references))).new_value(site, value, row, branch)
        numbers = range(len(self.references))
        found = [self._from(number).new_value(site, value, row, branch) for number in numbers]
        return torch.stack(found).mean(0)

    def _from(self, number: int) -> Patch:
        where = {name: getattr(self, name) for name in ("heads", "samples", "tokens")}
        tokens = self.reference_tokens[number] if self.reference_tokens else None
        return Patch(
            *(self.site, self.steps, self.branch), **where, source=self.references[number], from_tokens=tokens
        )


HOW = ("zero", "mean", "resample", "noise")
"""Ways to ablate."""


def drawn(seed: int, count: int) -> int:
    """Return which of ``count`` references is drawn: one for the whole run, so that its steps fit."""
    return int(torch.randint(count, (), generator=torch.Generator("cpu").manual_seed(seed)))
