"""Replacing: a value of one's own in place of an activation, an embedding say, or latents."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workbench.interventions.given import check_given, fitted
from workbench.interventions.intervention import Intervention
from workbench.tracing.ledger import Row
from workbench.tracing.sites import Site


@dataclass(frozen=True)
class Replace(Intervention):
    """Put a given value in place of an activation.

    Attributes:
        value: of one sample, the activation's shape without its rows, or what broadcasts to that.

    Example:
        >>> Replace("unet:inputs[1].encoder_hidden_states", value=embedding, branch="cond", tokens=(2,))
    """

    value: torch.Tensor = field(kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that there is a value."""
        super().__post_init__()
        check_given(self.value, "value", " Patch(…, source=run) takes another run's.")

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return the given value, ``(rows, ...)``."""
        return fitted(self.value, "value", value, site, row)
