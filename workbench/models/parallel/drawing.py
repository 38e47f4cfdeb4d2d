"""Random weights of a component in shards: those that one process would draw, and never all on one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps

import torch
from accelerate import init_empty_weights
from torch import nn

from workbench.models.parallel.managers import FSDP2Manager, blocks
from workbench.models.parallel.weights import placed


def draw(make: Callable[[], nn.Module], manager: FSDP2Manager, device: torch.device) -> nn.Module:
    """Make a module of random weights, of which each rank keeps its share.

    A twin without weights is sharded first. Then every rank draws every weight, from the generator of the
    first rank, and lets go of what is not its share as soon as a block is made. So the weights are those of
    one process; were a class to draw a block's weights once more after that, it would draw into the shards.

    Args:
        make: makes the module with its weights on the CPU; it is called several times.
        manager: shards it.
        device: where the shards go.
    """
    manager.share_noise()
    twins: list[nn.Module] = []
    with torch.random.fork_rng([]), init_empty_weights(include_buffers=False):
        kinds = {type(each) for each in blocks(make())}
        with _told(kinds, twins.append):
            twin = make()
    manager.parallelize(twin)
    shares: dict[nn.Parameter, nn.Parameter] = {}

    def keep_share(module: nn.Module, like: nn.Module) -> None:
        for owner, other in zip(module.modules(), like.modules(), strict=True):
            for name, parameter in owner._parameters.items():
                beside = other._parameters[name]
                if parameter is None or beside is None:
                    continue
                if shares.get(beside) is not parameter:
                    shares[beside] = placed(parameter.detach(), beside, device)
                owner._parameters[name] = shares[beside]

    waiting = iter(twins)
    with _told(kinds, lambda block: keep_share(block, next(waiting))):
        drawn = make()
    keep_share(drawn, twin)
    for owner, other in zip(drawn.modules(), twin.modules(), strict=True):
        for name, parameter in other._parameters.items():
            other._parameters[name] = None if parameter is None else shares[parameter]
        for name, buffer in owner._buffers.items():
            other._buffers[name] = None if buffer is None else buffer.to(device)
    return twin


@contextmanager
def _told(kinds: set[type[nn.Module]], tell: Callable[[nn.Module], None]) -> Iterator[None]:
    """Be told of each module of some classes when its constructor has ended."""
    with ExitStack() as stack:
        for kind in kinds:
            # What torch itself makes a block of is small, and its makers often change it afterwards.
            if not kind.__module__.startswith("torch."):
                stack.enter_context(_telling(kind, tell))
        yield


@contextmanager
def _telling(kind: type[nn.Module], tell: Callable[[nn.Module], None]) -> Iterator[None]:
    own, construct = vars(kind).get("__init__"), kind.__init__

    @wraps(construct)
    def constructed(self: nn.Module, *args: object, **settings: object) -> None:
        construct(self, *args, **settings)
        if type(self) is kind:
            tell(self)

    kind.__init__ = constructed  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del kind.__init__
        else:
            kind.__init__ = own  # type: ignore[method-assign]
