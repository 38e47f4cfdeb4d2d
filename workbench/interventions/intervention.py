"""What every intervention has: sites, steps, a branch, and a new value for what passes there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from workbench.errors import InputError
from workbench.tracing.ledger import ALL, Row
from workbench.tracing.sites import Site
from workbench.tracing.steps import Steps, branch_rows, covers, normal


@dataclass(frozen=True)
class Intervention(ABC):
    """A change at one site.

    Attributes:
        site: where, spelled ``unet.mid_block`` or ``unet.mid_block:input``.
        steps: which steps; None is every step. Negative ones count from the end.
        branch: which guidance branch; ``"all"`` is every row of the call.
    """

    site: str
    steps: Steps = None
    branch: str = ALL

    def __post_init__(self) -> None:
        Site.parse(self.site)
        object.__setattr__(self, "steps", normal(self.steps))
        if not isinstance(self.branch, str) or not self.branch:
            raise InputError(f"branch={self.branch!r} is not a branch. Give 'all', 'cond' or 'uncond'.")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site, parsed."""
        return (Site.parse(self.site),)

    def apply(self, site: Site, value: torch.Tensor, row: Row | None, total: int | None) -> torch.Tensor:
        """Return the value to go on with; ``value`` itself when this is not its moment."""
        if row is None or not covers(self.steps, row, total):  # type: ignore[arg-type]
            return value
        parts = branch_rows(row, self.branch, value.shape[0])
        if not parts:
            return value
        changed = value.clone()
        for branch, rows in parts:
            # Written into a clone, so that strides, and with them the kernels downstream, stay the same.
            changed[rows] = self.new_value(site, changed[rows], row, branch)
        return changed

    @abstractmethod
    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return the new value of one branch's rows, ``(rows, ...)``."""
