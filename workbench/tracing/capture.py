"""`Capture`: which values of a site are kept, and how."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from workbench.errors import InputError
from workbench.tracing.ledger import ALL, GUIDED, Row
from workbench.tracing.record import Passage, Record
from workbench.tracing.session import Session
from workbench.tracing.sites import Site
from workbench.tracing.steps import Steps, covers, normal
from workbench.tracing.storage.unpacking import dtype_of
from workbench.tracing.structure import map_tensors, pick


@dataclass(frozen=True)
class Capture:
    """Keeps some of what passes a site, in less space; give it in ``capture`` beside plain sites.

    A plain site keeps every call, every row and the exact bytes, on the CPU. What is kept in another
    dtype is rounded, and so is a patch from it.

    Attributes:
        site: where, spelled ``unet.mid_block`` or ``unet.mid_block:input``.
        dtype: how floating point values are kept (``"float16"``); None is as they are.
        device: where they are kept; None is where they are.
        steps: which steps; None is every step. Negative ones count from the end.
        branch: which guidance branch's rows; ``"all"`` is every row of the call.
    """

    site: str
    dtype: Any = None
    device: str | None = "cpu"
    steps: Steps = None
    branch: str = ALL

    def __post_init__(self) -> None:
        """Bring the choices into a plain, comparable form."""
        object.__setattr__(self, "site", str(Site.parse(self.site)))
        object.__setattr__(self, "steps", normal(self.steps))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", str(dtype_of(self.dtype)).removeprefix("torch."))
        if self.device is not None:
            object.__setattr__(self, "device", _device(self.device))
        if not isinstance(self.branch, str) or not self.branch:
            raise InputError(f"branch={self.branch!r} is not a branch. Give 'all', 'cond' or 'uncond'.")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site, parsed."""
        return (Site.parse(self.site),)

    def passage(self, value: Any, row: Row | None, total: int | None) -> Passage | None:
        """Return what is kept of a value that passes, or None where it is not wanted.

        Args:
            value: what passes at the site.
            row: the denoiser call it passes in; None outside of them, where there is no step or branch.
            total: how many steps the run has, if that is known.

        Raises:
            InputError: the run has no such step, or its rows do not divide into branches.
        """
        every = self.branch in (ALL, "both")
        if row is None:
            wanted = every and self.steps is None
        else:
            wanted = row.has(self.branch) and covers(self.steps, row, total)  # type: ignore[arg-type]
        if not wanted:
            return None
        one = None if row is None or every or row.branches == (self.branch,) else row
        kept = map_tensors(value, partial(self._keep, one))
        call, only = (None, None) if row is None else (row.call, row.only)
        return Passage(call, kept, only if one is None else self.branch)

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Begin with what a fork repeats of the run it leaves."""
        session.record.captured[self.site] = self._repeated(session)
        yield

    def take(self, session: Session, site: Site, value: Any) -> None:
        """Keep a value that passes, if it is wanted."""
        part = pick(value, site.leaf, site=str(site)) if site.leaf else value
        passage = self.passage(part, session.clock.now, session.clock.total_steps)
        if passage is not None:
            session.record.captured[self.site].append(passage)

    def deliver(self, record: Record) -> None:
        """Nothing more: values were kept as they passed."""

    def _keep(self, row: Row | None, tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.detach()
        if row is not None and plain.ndim:
            plain = plain[row.rows(self.branch, plain.shape[0])]
        cast = self.dtype is not None and plain.is_floating_point()
        dtype = dtype_of(self.dtype) if cast else plain.dtype
        return plain.to(self.device or plain.device, dtype, copy=True)

    def _repeated(self, session: Session) -> list[Passage]:
        if session.replay is None:
            return []
        whole = session.replay.record
        early = session.replay.early(self.sites[0])
        before = whole.asked(self.site)
        if before is not None:
            return early if before == self else []
        rows = {row.call: row for row in whole.ledger}
        kept = [
            self.passage(
                each.value,
                rows[each.call].guided if each.branch == GUIDED else rows[each.call],
                whole.ledger.steps,
            )
            for each in early
            if each.call is not None
        ]
        return [each for each in kept if each is not None]


def _device(name: Any) -> str:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device={name!r} is no device. Give 'cpu', 'cuda' or None.") from None
    if device.type not in ("cpu", "meta") and not torch.get_device_module(device).is_available():
        raise InputError(
            f"device={name!r} is not there on this machine. Give 'cpu', or None for the model's."
        )
    if device.type == "meta":
        raise InputError("device='meta' keeps no values. Give 'cpu', or None for the model's.")
    return str(device)
