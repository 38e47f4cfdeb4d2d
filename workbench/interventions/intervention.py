"""What every intervention has: sites, steps, a branch, and a new value for what passes there."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

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
        samples: which samples of the batch, as the images are numbered: the first prompt with all its
            images, then the next; negative ones count from the end. None is every sample. The others'
            values stay as they are, to the bit.
    """

    site: str
    steps: Steps = None
    branch: str = ALL
    samples: int | Iterable[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        Site.parse(self.site)
        object.__setattr__(self, "steps", normal(self.steps))
        if not isinstance(self.branch, str) or not self.branch:
            raise InputError(f"branch={self.branch!r} is not a branch. Give 'all', 'cond' or 'uncond'.")
        if self.samples is not None:
            object.__setattr__(self, "samples", _numbers(self.samples))

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
            part = changed[rows]
            if self.samples is None:
                changed[rows] = self.new_value(site, part, row, branch)
            else:
                chosen = row.rows_of(self.samples, len(part))  # type: ignore[arg-type]
                part[chosen] = self.new_value(site, part[chosen], row, branch)
        return changed

    @abstractmethod
    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return the new value of one branch's rows, ``(rows, ...)``."""


def _numbers(samples: int | Iterable[int]) -> tuple[int, ...]:
    try:
        chosen = tuple(
            operator.index(each) for each in (samples if isinstance(samples, Iterable) else (samples,))
        )
    except TypeError:
        raise InputError(f"samples={samples!r} does not number samples. Give 0, a range or a list.") from None
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"samples={samples!r} is empty or names one twice. Leave it out for every sample.")
    return chosen
