"""A module of one's own in the model: a sparse autoencoder, a probe, an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from workbench.errors import InputError
from workbench.interventions.intervention import Intervention
from workbench.tracing.ledger import Row
from workbench.tracing.sites import Site
from workbench.tracing.structure import check_fit


@dataclass(frozen=True)
class Attach(Intervention):
    """Run a module of one's own on what passes a site.

    Attributes:
        module: called with the value of one branch's rows, ``(rows, ...)``; returns the value to go on
            with, of the same shape and dtype, or None where it only looks. A ``nn.Module`` is used as it
            is: put it on the model's device yourself.
    """

    module: Callable[[torch.Tensor], Any] = field(kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Check that there is something to call."""
        super().__post_init__()
        if not callable(self.module):
            raise InputError(f"module={self.module!r} cannot be called. Give a torch module or a function.")

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return what the module makes of ``value``, ``(rows, ...)``; ``value`` where it makes nothing.

        Raises:
            ShapeError: the module returned something of another shape or dtype.
        """
        made = self.module(value)
        if made is None:
            return value
        check_fit(value, made, site=str(site))
        result: torch.Tensor = made
        return result
