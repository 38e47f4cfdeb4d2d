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

_BY_HEAD = ("heads", "text_heads", "query", "key", "value", "probs")
"""Ports whose values are ``(batch, heads, …)``."""


@dataclass(frozen=True)
class Intervention(ABC):
    """A change at one site.

    Attributes:
        site: where, spelled ``unet.mid_block`` or ``unet.mid_block:input``.
        steps: which steps; None is every step. Negative ones count from the end.
        branch: which guidance branch; ``"all"`` is every row of the call.
        heads: which heads of an attention layer, at a site whose values have them: ``…attn2:heads``. None is
            every head; the others stay as they are.
        samples: which samples of the batch, as the images are numbered: the first prompt with all its
            images, then the next; negative ones count from the end. None is every sample. The others'
            values stay as they are, to the bit.
    """

    site: str
    steps: Steps = None
    branch: str = ALL
    heads: int | Iterable[int] | None = field(default=None, kw_only=True)
    samples: int | Iterable[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self._check_site()
        object.__setattr__(self, "steps", normal(self.steps))
        if not isinstance(self.branch, str) or not self.branch:
            raise InputError(f"branch={self.branch!r} is not a branch. Give 'all', 'cond' or 'uncond'.")
        if self.samples is not None:
            object.__setattr__(self, "samples", _numbers("samples", self.samples))
        if self.heads is not None:
            object.__setattr__(self, "heads", _numbers("heads", self.heads))

    def _check_site(self) -> None:
        site = Site.parse(self.site)
        if self.heads is not None and site.port not in _BY_HEAD:
            raise InputError(
                f"{site} has no heads to choose from. The ports {', '.join(_BY_HEAD)} of an attention layer "
                "have them, such as '….attn2:heads'."
            )

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
                changed[rows] = self._of_heads(site, part, row, branch)
            else:
                chosen = row.rows_of(self.samples, len(part))  # type: ignore[arg-type]
                part[chosen] = self._of_heads(site, part[chosen], row, branch)
        return changed

    def _of_heads(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return the new value, where heads were chosen of these alone."""
        if self.heads is None:
            return self.new_value(site, value, row, branch)
        chosen, changed = check_heads(self.heads, value.shape[1], site=str(site)), value.clone()
        changed[:, chosen] = self.new_value(site, value[:, chosen], row, branch)
        return changed

    @abstractmethod
    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return the new value of one branch's rows, ``(rows, ...)``."""


def check_heads(heads: int | Iterable[int], count: int, *, site: str) -> list[int]:
    """Return heads counted from 0, of a layer that has ``count``.

    Raises:
        InputError: it has no such head.
    """
    chosen = list(heads) if isinstance(heads, Iterable) else [heads]
    for head in chosen:
        if not -count <= head < count:
            raise InputError(f"{site} has {count} heads (0 to {count - 1}); {head} is none of them.")
    found = [head % count for head in chosen]
    if len(set(found)) < len(found):
        raise InputError(f"heads={chosen} names a head of {site} twice.")
    return found


def _numbers(name: str, asked: int | Iterable[int]) -> tuple[int, ...]:
    try:
        chosen = tuple(operator.index(each) for each in (asked if isinstance(asked, Iterable) else (asked,)))
    except TypeError:
        raise InputError(f"{name}={asked!r} does not number {name}. Give 0, a range or a list.") from None
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"{name}={asked!r} is empty or names one twice. Leave it out for all of them.")
    return chosen
