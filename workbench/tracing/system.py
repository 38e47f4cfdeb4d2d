"""What the tracer needs to know of a model: its parts and how to run it. No pipeline by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from workbench.errors import TraceError

_TIME_ARGUMENTS = {"timestep", "timesteps", "t", "r", "time_step", "timestep_ratio"}
_NOT_DENOISERS = ("ControlNet", "Autoencoder", "Adapter", "TextModel", "Safety")


@dataclass(frozen=True)
class System:
    """A denoising system.

    Attributes:
        components: every part by name, modules and others.
        call: runs it once, with the pipeline's own keyword arguments.
        branches: its guidance branches in their order, where its author said so.
        by_hand: whether it is a loop that somebody wrote, of which less is known than of a pipeline.
    """

    components: Mapping[str, Any]
    call: Callable[..., Any]
    branches: tuple[str, ...] | None = None
    by_hand: bool = False

    @cached_property
    def denoisers(self) -> dict[str, nn.Module]:
        """The modules that are called with a timestep: UNets and transformers, one or more."""
        return {name: part for name, part in self.components.items() if is_denoiser(part)}

    def check_unchanged(self) -> None:
        """Refuse to go on with parts that the pipeline no longer has: nobody watches those it has now.

        Raises:
            TraceError: with the part and how to exchange it.
        """
        for name, part in self.components.items():
            now = getattr(self.call, name, part)
            if now is not part and (isinstance(part, nn.Module) or name in self.schedulers):
                raise TraceError(
                    f"pipeline.{name} was replaced ({type(part).__name__} by {type(now).__name__}) after "
                    "this run had been asked for. Replace parts between runs: the next takes what is there."
                )

    @cached_property
    def schedulers(self) -> dict[str, Any]:
        """The components that step latents along a list of timesteps."""
        return {name: part for name, part in self.components.items() if is_scheduler(part)}


def is_scheduler(part: Any) -> bool:
    """Whether a component steps latents along a list of timesteps."""
    return hasattr(part, "step") and (hasattr(part, "set_timesteps") or hasattr(part, "timesteps"))


@lru_cache(maxsize=256)
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's parameters; asked at every call of a run, hence remembered."""
    return tuple(inspect.signature(function).parameters)


def is_denoiser(part: Any) -> bool:
    """Whether a component predicts noise, velocity or a sample at a timestep."""
    kind = kind_of(part)
    if not isinstance(part, nn.Module) or any(word in kind.__name__ for word in _NOT_DENOISERS):
        return False
    return bool(_TIME_ARGUMENTS & set(taken(kind)))


def taken(kind: Any) -> tuple[str, ...]:
    """Return the names of what a component's class takes when it is called; TorchScript's says none."""
    forward = getattr(kind, "forward", None)
    return () if forward is None else parameters(forward)


def kind_of(part: Any) -> Any:
    """Return a component's class; ``torch.compile(module)`` and DDP wrap it in one of their own."""
    inner = part.module if isinstance(part, DistributedDataParallel) else part
    modules = getattr(inner, "_modules", ())  # of a scripted module no dict
    return type(inner._orig_mod if "_orig_mod" in modules else inner)


def told(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a denoiser is called with, by the names of its forward's parameters."""
    return {**dict(zip(parameters(kind_of(denoiser).forward)[1:], args, strict=False)), **kwargs}


def told_time(denoiser: nn.Module, given: Mapping[str, Any]) -> float:
    """Return the time a denoiser is called with, in its own unit; of the first row where each has one."""
    names = _times(kind_of(denoiser).forward)
    return next((as_number(given[name]) for name in names if name in given), 0.0)


def as_number(value: Any) -> float:
    """Return a number, or the first of a tensor's."""
    if not isinstance(value, torch.Tensor):
        return float(value or 0)
    return float(value if value.numel() == 1 else value.flatten()[0])


@lru_cache(maxsize=256)
def _times(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameters of a denoiser's forward that say a time."""
    return tuple(name for name in parameters(forward)[1:] if name in _TIME_ARGUMENTS)
