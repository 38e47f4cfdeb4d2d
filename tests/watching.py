"""Observers that know nothing of the tracer: what a run did, and what was left on the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks
from PIL import Image
from torch import nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack

HOOK_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_hooks",
)


def as_bytes(value: Any) -> Any:
    """Spell a value so that equality means the same bytes, shapes and types: NaN is NaN, 0 is not −0."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return ("tensor", tuple(value.shape), value.dtype, flat.numpy().tobytes())
    if isinstance(value, np.ndarray):
        return ("array", value.shape, str(value.dtype), value.tobytes())
    if isinstance(value, Image.Image):
        return ("image", value.size, value.mode, value.tobytes())
    if isinstance(value, dict):
        return {key: as_bytes(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(item) for item in value]
    return value


class Clocks:
    """The pipeline's own three clocks, and what its schedulers left.

    Attributes:
        calls: for each forward of a denoiser, its name, and the ticks and steps that were done before.
        ticks: how many times a scheduler was stepped.
        steps: how often the pipeline's progress bars were told to advance.
        timesteps: what each tick was stepped with.
        latents: what each tick left, as bytes.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []
        self.ticks = self.steps = 0
        self.timesteps: list[float] = []
        self.latents: list[Any] = []

    def advance(self, by: float | None = 1) -> None:
        self.steps += int(by or 0)

    def tick(self, timestep: Any, result: Any) -> None:
        self.ticks += 1
        self.timesteps.append(float(torch.as_tensor(timestep).flatten()[0]))
        self.latents.append(as_bytes(result[0] if isinstance(result, tuple) else result.prev_sample))


DENOISERS = ("unet", "transformer", "transformer_2", "decoder", "prior_prior")
SCHEDULERS = ("scheduler", "prior_scheduler")


@contextmanager
def clocks_of(pipeline: Any) -> Iterator[Clocks]:
    """Watch a pipeline's denoisers, schedulers and progress bars with plain hooks, for a while."""
    clocks = Clocks()
    with ExitStack() as stack:
        for name in DENOISERS:
            module = pipeline.components.get(name)
            if isinstance(module, nn.Module):
                called = partial(_called, clocks, name)
                stack.callback(module.register_forward_pre_hook(called).remove)
        for name in SCHEDULERS:
            if pipeline.components.get(name) is not None:
                stack.enter_context(_ticking(clocks, pipeline.components[name]))
        for kind in (DiffusionPipeline, LoopSequentialPipelineBlocks):
            stack.enter_context(_advancing(clocks, kind))
        yield clocks


def _called(clocks: Clocks, name: str, *_: Any) -> None:
    clocks.calls.append((name, clocks.ticks, clocks.steps))


@contextmanager
def _ticking(clocks: Clocks, scheduler: Any) -> Iterator[None]:
    step = scheduler.step
    shadowed = scheduler.__dict__.get("step")
    names = list(inspect.signature(type(scheduler).step).parameters)[1:]

    # With its signature: by it, pipelines decide whether to pass the generator.
    @wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        clocks.tick({**dict(zip(names, args, strict=False)), **kwargs}["timestep"], result)
        return result

    scheduler.step = watched
    try:
        yield
    finally:
        if shadowed is None:
            del scheduler.step
        else:
            scheduler.step = shadowed


@contextmanager
def _advancing(clocks: Clocks, kind: type[Any]) -> Iterator[None]:
    """Count at the class, as a cascade makes its bars in pipelines of its own."""
    progress_bar = kind.progress_bar

    def counted(self: Any, iterable: Any = None, total: int | None = None) -> Any:
        bar = progress_bar(self, iterable, total)
        if iterable is None:
            bar.update = clocks.advance
            return bar
        return _going_through(clocks, bar)

    kind.progress_bar = counted
    try:
        yield
    finally:
        kind.progress_bar = progress_bar


def _going_through(clocks: Clocks, bar: Any) -> Iterator[Any]:
    for each in bar:
        yield each
        clocks.advance()


@contextmanager
def latents_of(pipeline: Any) -> Iterator[list[Any]]:
    """Keep the latents that every ``scheduler.step`` returns, as bytes."""
    with clocks_of(pipeline) as clocks:
        yield clocks.latents


@contextmanager
def forwards_of(module: nn.Module) -> Iterator[list[int]]:
    """Count how often a module's real ``forward`` runs: one item a run, the rows of its input."""
    kind = type(module)
    forward = kind.forward
    seen: list[int] = []

    @wraps(forward)
    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            sample = args[0] if args else next(iter(kwargs.values()))
            seen.append(sample.shape[0])
        return forward(self, *args, **kwargs)

    kind.forward = counted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        kind.forward = forward  # type: ignore[method-assign]


def footprint(pipeline: Any) -> dict[str, Any]:
    """Spell everything a tracer might leave behind: hooks, shadowed methods, attributes, torch's own state.

    Two footprints are equal when nothing has come and nothing has gone. Run the pipeline once before
    taking one, as pipelines set attributes of their own.
    """
    found: dict[str, Any] = {
        "pipeline": _attributes(pipeline),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "modes": list(_get_current_function_mode_stack()),
        "kernel": id(torch.nn.functional.scaled_dot_product_attention),
        "global hooks": [
            list(table)
            for name, table in vars(torch_module).items()
            if name.startswith("_global") and isinstance(table, dict)
        ],
    }
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            for path, module in part.named_modules(prefix=name):
                found[path] = _attributes(module)
                found[f"{path} hooks"] = {
                    table: [(key, id(hook)) for key, hook in getattr(module, table).items()]
                    for table in HOOK_TABLES
                }
        elif part is not None:
            found[name] = _attributes(part)
    return found


def _attributes(thing: Any) -> dict[str, int | None]:
    """Name a thing's own attributes, with the identity of those that are called."""
    return {
        name: id(value) if callable(value) and not isinstance(value, (type, nn.Module)) else None
        for name, value in vars(thing).items()
    }
