"""Controls: changes as large as a patch's that carry nothing of the source."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workbench.interventions.intervention import Intervention
from workbench.interventions.patch import Patch
from workbench.tracing.ledger import Row
from workbench.tracing.sites import Site


@dataclass(frozen=True)
class RandomDirection(Intervention):
    """Move an activation as far as a patch would, in a random direction.

    What this does to a result is what any change of that size does; a patch says something where it
    does more.

    Attributes:
        patch: the patch whose distance ‖source − value‖ is taken, row by row.
        seed: of the direction, drawn anew for each call.
    """

    patch: Patch = field(kw_only=True, repr=False)
    seed: int = 0

    @classmethod
    def of(cls, patch: Patch, seed: int = 0) -> RandomDirection:
        """Return the control of a patch: same site, steps, branch and norm."""
        where = {name: getattr(patch, name) for name in ("heads", "samples", "tokens", "mask", "strength")}
        return cls(patch.site, patch.steps, patch.branch, **where, patch=patch, seed=seed)

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return ``value`` moved by the patch's distance, ``(rows, ...)``."""
        change = (self.patch.new_value(site, value, row, branch) - value).flatten(1)
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + row.call)
        direction = torch.randn(change.shape, generator=generator).to(value.device, value.dtype)
        length = change.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)
        moved: torch.Tensor = value + (direction * length).reshape(value.shape)
        return moved
