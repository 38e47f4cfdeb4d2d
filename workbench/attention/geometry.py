"""Where in an attention call the text stands, and where on the image its queries lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from inspect import signature
from math import ceil
from typing import Any

import torch
from torch import nn

from workbench.errors import GuardError

IMAGE_TO_TEXT, TEXT_TO_IMAGE = "image->text", "text->image"
IMAGE_TO_IMAGE, TEXT_TO_TEXT = "image->image", "text->text"
BLOCKS = (IMAGE_TO_TEXT, TEXT_TO_IMAGE, IMAGE_TO_IMAGE, TEXT_TO_TEXT)
"""The parts of an attention matrix: whose queries look at whose keys.

Cross-attention has the first alone, self-attention the third, joint attention all four.
"""


@dataclass
class Scope:
    """An attention module that is being run, and what is known of its text.

    Attributes:
        path: the module's path.
        text: how many text tokens it looks at, 0 for self-attention.
        mixed: whether text and image are one sequence (joint attention).
        text_first: in a mixed sequence, whether the text comes first; None until it is seen.
        text_keys: the text's own keys, where the layer projects them by themselves.
        image: how many tokens the layer was given besides.
        batch: how many rows it was given.
        streams: what it was given for image and text, where these are apart.
        calls: how many times it has called the kernel.
        masked: whether it masks keys in that call.
        text_asks: whether the text has queries in it, as it has in a mixed sequence but for layers that only
            add its keys to the image's.
        of_image: whether what the layer was given besides the text is the image, as far as can be told.
    """

    path: str
    text: int = 0
    mixed: bool = False
    text_first: bool | None = None
    text_keys: torch.Tensor | None = None
    image: int = 0
    batch: int | None = None
    streams: tuple[torch.Tensor, torch.Tensor] | None = None
    calls: int = 0
    masked: bool = False
    text_asks: bool = True
    of_image: bool = True

    def joins_by_itself(self, queries: int, keys: int) -> bool:
        """Whether the layer puts image and text together in a way that is not known here."""
        return not self.mixed and self.text > 0 and queries == keys == self.image + self.text

    def see_call(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Learn from what is handed to the kernel, each ``(batch, heads, tokens, head_dim)``."""
        self.calls += 1
        self.masked = mask is not None
        if self.image:
            self.mixed = self.mixed and key.shape[2] == self.image + self.text
            self.text_asks = query.shape[2] != self.image

    def see_cat(self, tensors: Any) -> None:
        """Learn the order of a mixed sequence from how its two halves are put together."""
        if len(tensors) != 2:
            return
        if self.streams is not None and not self.mixed:
            image, text = self.streams
            if {id(each) for each in tensors} == {id(image), id(text)}:
                self.mixed, self.text_first = True, tensors[0] is text
        if not self.mixed or self.text_first is not None:
            return
        first, second = (_same_storage(tensor, self.text_keys) for tensor in tensors)
        if first == second:
            first, second = (tensor.ndim > 2 and self.text in tensor.shape[1:-1] for tensor in tensors)
        # Where both are as long as the text, the queries say nothing and the keys decide.
        if first != second:
            self.text_first = first

    def has(self, block: str) -> bool:
        """Whether the call has this block of the attention matrix (see `BLOCKS`)."""
        if not self.of_image:
            return False
        if self.mixed:
            return self.text_asks or block in (IMAGE_TO_TEXT, IMAGE_TO_IMAGE)
        return block == (IMAGE_TO_TEXT if self.text else IMAGE_TO_IMAGE)

    def may_have(self, block: str) -> bool:
        """Whether it has, as far as can be told before image and text may be put together."""
        return self.has(block) or (self.streams is not None and self.of_image)

    def span(self, stream: str, total: int) -> slice:
        """Return where ``"image"`` or ``"text"`` stands among ``total`` queries or keys."""
        if not self.mixed or (stream == "image" and total == self.image):
            return slice(0, total)
        first = (stream == "text") == (self.text_first is not False)
        length = self.text if stream == "text" else total - self.text
        return slice(0, length) if first else slice(total - length, total)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer of diffusers: it has a processor and a query projection."""
    return hasattr(module, "processor") and hasattr(module, "to_q")


def scope_of(
    path: str,
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    beside: tuple[int, int] | None,
) -> Scope:
    """Return the scope of an attention call.

    Args:
        path: the module's path.
        layer: the module.
        args: its positional arguments.
        kwargs: its keyword arguments.
        beside: how many tokens of text and of image the block around it was given (`lengths_given`):
            single-stream blocks have put that text in front of the image already.
    """
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    own = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    if not isinstance(hidden, torch.Tensor):
        return Scope(path)
    image = hidden.shape[1] if hidden.ndim == 3 else hidden.shape[2:].numel()
    found = Scope(path, image=image, batch=hidden.shape[0])
    if isinstance(own, torch.Tensor) and own.ndim == 3 and own is not hidden:
        found.text, found.streams = own.shape[1], (hidden, own)
        found.mixed = getattr(layer, "add_k_proj", None) is not None
    elif beside is not None and image == sum(beside):
        (found.text, found.image), found.mixed, found.text_first = beside, True, True
    return found


def lengths_given(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Return how many tokens of text and of image a module is called with; None unless with both."""
    named = by_name(module, args, kwargs)
    text, image = named.get("encoder_hidden_states"), named.get("hidden_states")
    if not isinstance(text, torch.Tensor) or not isinstance(image, torch.Tensor) or text.ndim != 3:
        return None
    return (text.shape[1], image.shape[1]) if image.ndim == 3 else None


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a module is called with, by the names of its forward's parameters."""
    return {**dict(zip(_names(type(module).forward), args, strict=False)), **kwargs}


@cache
def _names(forward: Any) -> list[str]:
    return list(signature(forward).parameters)[1:]


@dataclass(frozen=True)
class Given:
    """What a denoiser is given in a call; by it, layers are told apart that are told of no text.

    Attributes:
        images: the numbers of tokens that its picture or film may be in a layer; empty if unknown.
        rows: the numbers of rows that these may come in.
        texts: the lengths of its texts.
        packed: whether its picture comes as a sequence, from which others may differ by a token or two.
    """

    images: frozenset[int] = frozenset()
    rows: frozenset[int] = frozenset()
    texts: frozenset[int] = frozenset()
    packed: bool = False

    @classmethod
    def to(cls, denoiser: nn.Module, named: Mapping[str, Any]) -> Given:
        """Return what ``denoiser`` is given, by the names of its parameters."""
        sample = named.get("sample", named.get("hidden_states"))
        texts = frozenset(
            value.shape[1]
            for name, value in named.items()
            if name.startswith("encoder_hidden_states") and getattr(value, "ndim", 0) == 3
        )
        if not isinstance(sample, torch.Tensor) or sample.ndim not in (3, 4, 5):
            return cls(texts=texts)
        if sample.ndim == 3:
            return cls(frozenset(sample.shape[1:]), frozenset(sample.shape[:1]), texts, packed=True)
        patch = _patch(denoiser)
        sides = [patch] if patch else [2**level for level in range(8)]
        pictures = {ceil(sample.shape[-2] / side) * ceil(sample.shape[-1] / side) for side in sides}
        frames = {1, *sample.shape[1:-2]} if sample.ndim == 5 else {1}
        thinned = {ceil(count / by) for count in frames for by in (1, 2, 4)}
        return cls(
            frozenset(picture * count for picture in pictures for count in thinned),
            frozenset(sample.shape[0] * count for count in frames),
            texts,
        )

    def of_image(self, scope: Scope) -> bool:
        """Whether what a layer is given besides the text it is told of is the image: not text, nor frames.

        Raises:
            GuardError: it is the image and more: text stands in it, and nobody knows where.
        """
        if scope.mixed or not self.images:
            return True
        tokens = scope.image
        if tokens not in self.images and self.texts and not scope.text:
            if tokens in self.texts:
                return False
            if tokens > max(self.images) + (min(self.texts) - 1 if self.packed else 0):
                raise unknown_order(scope.path)
        return scope.batch in self.rows


def unknown_order(path: str) -> GuardError:
    """Return the refusal of a layer whose text nobody can tell from its image."""
    return GuardError(
        f"{path} puts image and text together by itself, and which is which is not known. Read its weights "
        "at the port probs, or leave it out of sites."
    )


def _patch(denoiser: nn.Module) -> int | None:
    """Return how many latent pixels a side make a token in a transformer; None for a UNet."""
    size = getattr(getattr(denoiser, "config", None), "patch_size", None)
    side = size[-1] if isinstance(size, (tuple, list)) else size
    return side if isinstance(side, int) else None


def _same_storage(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def aspect_of(sample: Any, arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return how wide a run's pictures are to how high.

    Args:
        sample: what the denoiser is given, ``(batch, channels, rows, columns)`` where it is not packed.
        arguments: the pipeline's own, whose ``width`` and ``height`` count where it is.
    """
    if isinstance(sample, torch.Tensor) and sample.ndim in (4, 5):
        return int(sample.shape[-1]), int(sample.shape[-2])
    width, height = arguments.get("width"), arguments.get("height")
    return (int(width), int(height)) if width and height else (1, 1)


def grid(queries: int, width: int, height: int) -> tuple[int, int] | None:
    """Return the ``(rows, columns)`` that ``queries`` image tokens of a picture of this size form."""
    rows = max(round((queries * height / width) ** 0.5), 1)
    for candidate in (rows, rows - 1, rows + 1):
        if candidate > 0 and queries % candidate == 0:
            return candidate, queries // candidate
    return None
