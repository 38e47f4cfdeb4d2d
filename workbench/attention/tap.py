"""Taps of attention layers: what goes into the kernel, and out of it, passes by those who change it and look.

A torch function mode sees the call of scaled dot product attention, with the very values that the kernel
gets. It is on only while a layer computes whose call somebody wants, since it sees every call of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from workbench.attention.geometry import Scope, lengths_given, scope_of
from workbench.tracing.rig import Rig

Handed = dict[str, Any]
"""What an attention call gives to the kernel, by the names of `scaled_dot_product_attention`."""

PORT, EDIT, LOOK = range(3)
"""The order in which values pass by: ports, then edits as they were given, then those who only look."""

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_TEXT_KEYS = ("add_k_proj", "to_added_qkv", "norm_added_k")


class Rest(Protocol):
    """What comes after: the others whom the values pass by, and the kernel."""

    def __call__(self, **handed: Any) -> torch.Tensor:
        """Return what they make of these values."""

    def unseen(self, **handed: Any) -> torch.Tensor:
        """Return what the kernel makes after the other edits; those who look see nothing of it."""

    def plain(self, **handed: Any) -> torch.Tensor:
        """Return what the kernel makes of these values, whoever else there is."""


Look = Callable[[Scope, Handed, Rest], torch.Tensor | None]
"""Sees an attention call; what it returns, if anything, goes on in place of what the rest makes."""


@dataclass(frozen=True)
class _Link:
    """One of those whom a layer's values pass by: its turn, whether it wants a call, what it does then."""

    turn: int
    wants: Callable[[Scope], bool]
    look: Look


class _Block:
    """The block around layers: how many tokens of text and of image it was given, where that is known."""

    def __init__(self, rig: Rig, block: nn.Module) -> None:
        self.given: tuple[int, int] | None = None
        rig.before(block, self._see)

    def _see(self, block: nn.Module, args: tuple[Any, ...], kwargs: Handed) -> None:
        self.given = lengths_given(block, args, kwargs)


class Tap:
    """What sees and changes the kernel calls of one attention layer, while a rig is on it.

    Args:
        rig: what it is put on the layer with.
        layer: the attention layer.
    """

    def __init__(self, rig: Rig, layer: nn.Module) -> None:
        self._rig = rig
        self._layer = layer
        self._path = ""
        self._links: list[_Link] = []
        self._block: _Block | None = None
        self._scope: Scope | None = None
        rig.wrap(layer, "forward", self._around)

    @classmethod
    def on(cls, rig: Rig, layer: nn.Module) -> Tap:
        """Return the tap that a rig has on a layer."""
        return rig.beside(layer, cls, partial(cls, rig, layer))

    def add(self, turn: int, look: Look, wants: Callable[[Scope], bool] = lambda _: True) -> None:
        """Have ``look`` see the calls that it ``wants``, of those with the same turn after the others."""
        self._links.append(_Link(turn, wants, look))
        self._links.sort(key=lambda link: link.turn)

    def locate(self, path: str, block: nn.Module | None) -> None:
        """Say where the layer is, so that its text can be told from its image; done once."""
        if self._path:
            return
        self._path = path
        if block is not None:
            self._block = self._rig.beside(block, _Block, partial(_Block, self._rig, block))
        for name in _TEXT_KEYS:
            if isinstance(getattr(self._layer, name, None), nn.Module):
                self._rig.after(getattr(self._layer, name), self._see_text_keys)

    def _see_text_keys(self, _module: nn.Module, _args: Any, _kwargs: Any, output: torch.Tensor) -> None:
        if self._scope is not None:
            self._scope.text_keys = output

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            beside = None if self._block is None else self._block.given
            scope = scope_of(self._path, self._layer, args, kwargs, beside)
            wanted = [link for link in self._links if link.wants(scope)]
            if not wanted:
                return forward(*args, **kwargs)
            self._scope = scope
            try:
                with _Mode(scope, wanted):
                    return forward(*args, **kwargs)
            finally:
                self._scope = None

        return tapped


class _Mode(TorchFunctionMode):
    """Sees one forward of a layer: its kernel calls, and how joint sequences are put together."""

    def __init__(self, scope: Scope, links: list[_Link]) -> None:
        super().__init__()
        self._scope = scope
        self._links = links

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            handed = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            self._scope.see_call(handed["query"], handed["key"], handed.get("attn_mask"))
            return _Chain(self._scope, self._links, func)(**handed)
        if func is torch.cat:
            self._scope.see_cat(args[0] if args else kwargs.get("tensors", ()))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Chain:
    """The links that are left of one kernel call."""

    scope: Scope
    links: list[_Link]
    kernel: Callable[..., torch.Tensor]

    def __call__(self, **handed: Any) -> torch.Tensor:
        if not self.links:
            return self.kernel(**handed)
        rest = _Chain(self.scope, self.links[1:], self.kernel)
        made = self.links[0].look(self.scope, handed, rest)
        return rest(**handed) if made is None else made

    def unseen(self, **handed: Any) -> torch.Tensor:
        edits = [link for link in self.links if link.turn == EDIT]
        return _Chain(self.scope, edits, self.kernel)(**handed)

    def plain(self, **handed: Any) -> torch.Tensor:
        return self.kernel(**handed)
