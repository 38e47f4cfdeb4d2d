"""The ports ``query``, ``key``, ``value`` and ``probs``: what an attention layer hands to the kernel.

No module owns these values: they come after normalisation and rotary embeddings, with image and text put
together where attention is joint. The weights, ``probs``, are computed beside the kernel where they are asked
for; where they are changed, the layer goes on with them in place of what the kernel made.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from workbench.attention.heads import head_count
from workbench.attention.softmax import causal, weights
from workbench.errors import GuardError, InputError
from workbench.tracing.guards import KERNEL_PORTS
from workbench.tracing.ports import PassBy, add_port
from workbench.tracing.rig import Method, Owned, Rig, Target

_ARGUMENTS = (*KERNEL_PORTS, "attn_mask", "dropout_p", "is_causal")


class _Handover:
    """Where one layer's values pass on their way to the kernel; its methods are what is hooked."""

    def query(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def key(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def value(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def probs(self, value: torch.Tensor) -> torch.Tensor:
        return value


class _Handing(TorchFunctionMode):
    """Lets the values of the attention that is computed inside pass by, once in each forward."""

    def __init__(self, rig: Rig, handover: _Handover, layer: nn.Module, batch: int | None) -> None:
        super().__init__()
        self._rig = rig
        self._handover = handover
        self._layer = layer
        self._batch = batch
        self._handed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handed = dict(kwargs or {})
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **handed)
        handed |= dict(zip(_ARGUMENTS, args, strict=False))
        self._check(handed["query"])
        for port in KERNEL_PORTS:
            handed[port] = getattr(self._handover, port)(handed[port])
        made = func(**handed)
        return self._by_weights(handed, made) if self._rig.hooked(Method(self._handover, "probs")) else made

    def _by_weights(self, handed: dict[str, Any], made: torch.Tensor) -> torch.Tensor:
        """Let the weights pass by; return what the kernel made, or what they make if they were changed."""
        query, value = handed["query"], handed["value"]
        mask = handed.get("attn_mask")
        if handed.get("is_causal"):
            mask = causal(query.shape[2], handed["key"].shape[2], query.device)
        probs = weights(query, handed["key"], scale=handed.get("scale"), mask=mask)
        before = probs.clone()
        changed = self._handover.probs(probs)
        same = (changed == before).all(-1, keepdim=True)
        if same.all():
            return made
        if value.shape[1] != query.shape[1]:
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        # Of queries whose weights stayed, what the kernel made stays to the bit.
        return torch.where(same, made, changed.to(value.dtype) @ value)

    def _check(self, query: torch.Tensor) -> None:
        """Refuse a layer that attends twice, or with part of its batch: whose values are these?"""
        name = type(self._layer).__name__
        if self._handed:
            raise GuardError(
                f"{name} hands values to the kernel twice in one call, as for an image prompt. Take them "
                "from its projections instead (to_q, to_k, to_v), or switch that off."
            )
        if self._batch is not None and query.shape[0] != self._batch:
            raise GuardError(
                f"{name} hands {query.shape[0]} of {self._batch} rows to the kernel, as for perturbed "
                "guidance. Take values from its projections instead (to_q, to_k, to_v), or switch that off."
            )
        self._handed = True


def attach(port: str, rig: Rig, target: Target, pass_by: PassBy) -> Owned:
    """Hand what goes into the kernel, ``(batch, heads, tokens, head_dim)``, to ``pass_by``.

    Keys and values may have fewer heads than queries, where these share them. The weights are
    ``(batch, heads, queries, keys)``, float32, in full.

    Raises:
        InputError: the target is no attention layer.
    """
    if not isinstance(target, nn.Module) or head_count(target) is None or _holds_attention(target):
        named = type(target).__name__ if isinstance(target, nn.Module) else f"The method {target.name}"
        raise InputError(f"{named} has no {port}. Ask an attention layer for it, such as '….attn1:{port}'.")
    handover = rig.beside(target, _Handover, partial(_watch, rig, target))
    return rig.after(Method(handover, port), lambda _owner, _args, _kwargs, value: pass_by(value))


def _holds_attention(module: nn.Module) -> bool:
    return any(head_count(each) is not None for each in module.modules() if each is not module)


def _watch(rig: Rig, layer: nn.Module) -> _Handover:
    handover = _Handover()

    def shadow(forward: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            first = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
            with _Handing(rig, handover, layer, None if first is None else first.shape[0]):
                return forward(*args, **kwargs)

        return inside

    rig.wrap(layer, "forward", shadow)
    return handover


for _port in (*KERNEL_PORTS, "probs"):
    add_port(_port, partial(attach, _port))
