"""`Graph`: a run that keeps autograd's graph through chosen steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from workbench.tracing.guards import check_graph
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.session import Session
from workbench.tracing.steps import Steps, covers, normal


class Graph:
    """A probe under which the chosen steps, and what comes between them, are differentiable.

    Pipelines run without gradients. The graph begins where the first chosen step calls the denoiser, ends
    where the next step that is not chosen does, and after a chosen last step goes on through the decoder.

    Args:
        steps: which steps; None is every step. Negative ones count from the end.
        recompute: keep no more of each denoiser call than its inputs, and compute it again on the way
            back (Chen et al. 2016, arXiv:1604.06174): memory for one call, the time of a run more. What
            is hooked inside must stay so until then.
    """

    def __init__(self, steps: Steps = None, *, recompute: bool) -> None:
        self.steps = normal(steps)
        self.recompute = recompute

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Switch gradients on and off as the steps come, for as long as the run goes."""
        check_graph(session.system.denoisers)
        session.clock.started.append(lambda row: self._switch(session, row))
        if self.recompute:
            for owner, name in _costly(session):
                session.rig.wrap(owner, name, partial(_recomputed, session))
        before = torch.is_grad_enabled()
        session.rig.enter(_Leaving())
        try:
            yield
        finally:
            torch.set_grad_enabled(before)

    def deliver(self, record: Record) -> None:
        """Nothing: a record keeps values without their graph."""

    def _switch(self, session: Session, row: Row) -> None:
        chosen = covers(self.steps, row, session.clock.total_steps) and not session.replaying(row)
        torch.set_grad_enabled(chosen)


class _Leaving(TorchFunctionMode):
    """Lets a result that has a graph become an array or an image, as pipelines expect."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and args[0].requires_grad:
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


def _costly(session: Session) -> Iterator[tuple[Any, str]]:
    """Yield what is worth computing again: each denoiser's forward, each decoder's ``decode``."""
    for module in session.system.denoisers.values():
        yield module, "forward"
    for part in session.system.components.values():
        if isinstance(part, nn.Module) and callable(getattr(part, "decode", None)):
            yield part, "decode"


def _recomputed(session: Session, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return method(*args, **kwargs)
        row, before = session.clock.row, True

        def compute(*args: Any, **kwargs: Any) -> Any:
            nonlocal before
            if before:
                before = False
                return method(*args, **kwargs)
            with session.again(row):
                return method(*args, **kwargs)

        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    return call
