"""A feature of a sparse autoencoder, turned up, down or off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from workbench.errors import InputError
from workbench.interventions.intervention import Intervention, check_number
from workbench.tracing.ledger import Row
from workbench.tracing.sites import Site
from workbench.tracing.structure import check_fit


@dataclass(frozen=True)
class Feature(Intervention):
    """Change one feature of what passes a site.

    What the autoencoder does not explain of the activation is left as it was: only the difference that the
    feature makes is added (Templeton et al., 2024, "Scaling Monosemanticity").

    Attributes:
        sae: with ``encode``, from the value of one branch's rows to features, ``(…, features)``, and
            ``decode``, back again. Put it on the model's device yourself.
        feature: which one, counted from 0.
        to: what it is clamped to.
        times: what it is multiplied by: 0 turns it off.
    """

    sae: Any = field(kw_only=True, repr=False)
    feature: int = field(kw_only=True)
    to: float | None = field(default=None, kw_only=True)
    times: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Check the autoencoder and the change."""
        super().__post_init__()
        if not (callable(getattr(self.sae, "encode", None)) and callable(getattr(self.sae, "decode", None))):
            raise InputError(f"sae={type(self.sae).__name__} has no encode and decode.")
        if (self.to is None) == (self.times is None):
            raise InputError(f"to={self.to!r}, times={self.times!r}: give one of the two.")
        check_number("to" if self.times is None else "times", self.to if self.times is None else self.times)
        if not isinstance(self.feature, int) or self.feature < 0:
            raise InputError(f"feature={self.feature!r} is no feature. They are counted from 0.")

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return ``value`` with the difference that the feature makes, ``(rows, ...)``.

        Raises:
            InputError: the autoencoder has no such feature.
            ShapeError: it makes something of another shape or dtype.
        """
        features: torch.Tensor = self.sae.encode(value)
        if self.feature >= features.shape[-1]:
            raise InputError(
                f"The autoencoder at {site} has {features.shape[-1]} features, counted from 0; "
                f"{self.feature} is none of them."
            )
        changed = features.clone()
        old = features[..., self.feature]
        changed[..., self.feature] = (
            old * self.times if self.times is not None else torch.full_like(old, self.to or 0.0)
        )
        made: torch.Tensor = self.sae.decode(changed) - self.sae.decode(features)
        check_fit(value, made, site=str(site))
        return value + made
