"""Making an activation larger, smaller or nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from workbench.errors import InputError
from workbench.interventions.intervention import Intervention
from workbench.tracing.ledger import Row
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
        if not isinstance(self.factor, (int, float)) or not math.isfinite(self.factor):
            raise InputError(f"factor={self.factor!r} is no number to multiply by.")

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return the multiplied value, ``(rows, ...)``."""
        return value * self.factor


@dataclass(frozen=True)
class Ablate(Intervention):
    """Put zeros in place of an activation: what then goes missing depended on it.

    A zero is not what the model is used to seeing there; a patch from another run, or a control of the same
    size, tells how much of what happens is due to that.
    """

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return zeros, ``(rows, ...)``."""
        return torch.zeros_like(value)
