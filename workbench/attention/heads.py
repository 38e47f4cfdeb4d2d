"""The ports ``heads`` and ``text_heads``: what each head computed, before a projection mixes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from workbench.errors import InputError
from workbench.tracing.ports import PassBy, add_port
from workbench.tracing.rig import Owned, Rig, Target

_COUNTS = ("heads", "num_heads", "n_heads", "num_attention_heads")
_PROJECTIONS = ("to_out", "out_proj", "o_proj", "o")


def head_count(module: nn.Module) -> int | None:
    """Return how many heads an attention layer has; None for what is no attention layer."""
    for name in _COUNTS:
        count = getattr(module, name, None)
        if isinstance(count, int):
            return count
    config = getattr(module, "config", None)
    count = getattr(config, "num_attention_heads", None) if projection_path(module) is not None else None
    return count if isinstance(count, int) else None


def split(value: torch.Tensor, heads: int) -> torch.Tensor:
    """View ``(batch, queries, heads * head_dim)`` as ``(batch, heads, queries, head_dim)``."""
    return value.view(*value.shape[:-1], heads, -1).transpose(1, 2)


def join(value: torch.Tensor) -> torch.Tensor:
    """Return ``(batch, heads, queries, head_dim)`` as ``(batch, queries, heads * head_dim)``."""
    return value.transpose(1, 2).flatten(2)


def attach(rig: Rig, target: Target, pass_by: PassBy) -> Owned:
    """Hand per-head outputs, ``(batch, heads, queries, head_dim)``, to ``pass_by``.

    Of a joint attention with a projection each for image and text these are the image's; of one
    without any projection (Flux's single blocks) those of the whole sequence.

    Raises:
        InputError: the target is no attention layer.
    """
    pass_heads = _by_heads(target, pass_by)
    assert isinstance(target, nn.Module)
    path = projection_path(target)
    if path is not None:
        return _before(rig, target.get_submodule(path), pass_heads)

    def after(_: Any, _args: Any, _kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (pass_heads(output[0]), *output[1:])
        return pass_heads(output)

    return rig.after(target, after)


def attach_text(rig: Rig, target: Target, pass_by: PassBy) -> Owned:
    """Hand a joint attention's per-head outputs for the text, ``(batch, heads, tokens, head_dim)``.

    Raises:
        InputError: the target is no attention layer, or has no projection for the text.
    """
    pass_heads = _by_heads(target, pass_by)
    projection = getattr(target, "to_add_out", None)
    if not isinstance(projection, nn.Module):
        raise InputError(
            f"{type(target).__name__} has no output for the text here, so it has no text_heads: only a joint "
            "attention has that projects image and text by themselves, as in SD3 and Flux's double blocks."
        )
    return _before(rig, projection, pass_heads)


def _before(rig: Rig, projection: nn.Module, change: PassBy) -> Owned:
    return rig.before(projection, lambda _owner, args, kwargs: ((change(args[0]), *args[1:]), kwargs))


def _by_heads(target: Target, pass_by: PassBy) -> PassBy:
    """Return what lets heads side by side pass by one after the other."""
    heads = head_count(target) if isinstance(target, nn.Module) else None
    if heads is None:
        named = type(target).__name__ if isinstance(target, nn.Module) else f"The method {target.name}"
        raise InputError(f"{named} has no heads. Ask an attention layer for them, such as '….attn1:heads'.")
    count = heads

    def pass_heads(value: torch.Tensor) -> torch.Tensor:
        parts = split(value, count)
        changed = pass_by(parts)
        return value if changed is parts else join(changed)

    return pass_heads


def projection_path(layer: nn.Module) -> str | None:
    """Return the path, below a layer, of what mixes the heads of its image; None if nothing does."""
    for name in _PROJECTIONS:
        found = getattr(layer, name, None)
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found):
            return f"{name}.0"
        if isinstance(found, nn.Module):
            return name
    return None


add_port("heads", attach)
add_port("text_heads", attach_text)
