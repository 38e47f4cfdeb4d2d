"""The ports ``query``, ``key``, ``value`` and ``probs``: what an attention layer hands to the kernel.

No module owns these values: they come after normalisation and rotary embeddings, with image and text put
together where attention is joint. The weights, ``probs``, are computed beside the kernel where they are asked
for; where they are changed, the layer goes on with them in place of what the kernel made.

They are what the layer itself hands over: edits of attention act on them behind the ports.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from workbench.attention.geometry import Scope
from workbench.attention.heads import head_count
from workbench.attention.softmax import causal, weights
from workbench.attention.tap import PORT, Handed, Rest, Tap
from workbench.errors import GuardError, InputError
from workbench.tracing.guards import KERNEL_PORTS
from workbench.tracing.ports import PassBy, add_port
from workbench.tracing.rig import Method, Owned, Rig, Target


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


class _Handing:
    """Lets the values of a layer's attention pass by the ports, once in each forward."""

    def __init__(self, rig: Rig, layer: nn.Module) -> None:
        self.handover = _Handover()
        self._rig = rig
        self._layer = layer
        Tap.on(rig, layer).add(PORT, self._hand)

    def _hand(self, scope: Scope, handed: Handed, rest: Rest) -> torch.Tensor:
        self._check(scope, handed["query"])
        handed |= {port: getattr(self.handover, port)(handed[port]) for port in KERNEL_PORTS}
        made = rest(**handed)
        if not self._rig.hooked(Method(self.handover, "probs")):
            return made
        return self._by_weights(scope, handed, made, rest)

    def _by_weights(self, scope: Scope, handed: Handed, made: torch.Tensor, rest: Rest) -> torch.Tensor:
        """Let the weights pass by; return what the kernel made, or what they make if they were changed.

        Raises:
            InputError: an edit behind the ports has changed what these weights would make.
        """
        query, value = handed["query"], handed["value"]
        mask = handed.get("attn_mask")
        if handed.get("is_causal"):
            mask = causal(query.shape[2], handed["key"].shape[2], query.device)
        probs = weights(query, handed["key"], scale=handed.get("scale"), mask=mask)
        before = probs.clone()
        changed = self.handover.probs(probs)
        same = (changed == before).all(-1, keepdim=True)
        if same.all():
            return made
        if value.shape[1] != query.shape[1]:
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        if ((made != rest.plain(**handed)).any(-1, keepdim=True) & ~same).any():
            raise InputError(
                f"At {scope.path} an edit of attention acts where the weights (probs) are changed too, and "
                "would be lost. Do both in one change of the weights, or let each act in its own steps."
            )
        # Of queries whose weights stayed, what the kernel made stays to the bit.
        return torch.where(same, made, changed.to(value.dtype) @ value)

    def _check(self, scope: Scope, query: torch.Tensor) -> None:
        """Refuse a layer that attends twice, or with part of its batch: whose values are these?"""
        name = type(self._layer).__name__
        if scope.calls > 1:
            raise GuardError(
                f"{name} hands values to the kernel twice in one call, as for an image prompt. Take them "
                "from its projections instead (to_q, to_k, to_v), or switch that off."
            )
        if scope.batch is not None and query.shape[0] != scope.batch:
            raise GuardError(
                f"{name} hands {query.shape[0]} of {scope.batch} rows to the kernel, as for perturbed "
                "guidance. Take values from its projections instead (to_q, to_k, to_v), or switch that off."
            )


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
    handing = rig.beside(target, _Handing, partial(_Handing, rig, target))
    return rig.after(Method(handing.handover, port), lambda _owner, _args, _kwargs, value: pass_by(value))


def _holds_attention(module: nn.Module) -> bool:
    return any(head_count(each) is not None for each in module.modules() if each is not module)


for _port in (*KERNEL_PORTS, "probs"):
    add_port(_port, partial(attach, _port))
