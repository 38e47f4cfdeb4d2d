"""Where in an attention call the text stands, and where on the image its queries lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
        text: how many text tokens there are, 0 for self-attention.
        mixed: whether text and image are one sequence (joint attention).
        text_first: in a mixed sequence, whether the text comes first; None until it is seen.
        text_keys: the text's own keys, where the layer projects them by themselves.
        image: how many tokens the layer was given besides.
    """

    path: str
    text: int = 0
    mixed: bool = False
    text_first: bool | None = None
    text_keys: torch.Tensor | None = None
    image: int = 0

    def joins_by_itself(self, queries: int, keys: int) -> bool:
        """Whether the layer puts image and text together in a way that is not known here."""
        return not self.mixed and self.text > 0 and queries == keys == self.image + self.text

    def see_cat(self, tensors: Any) -> None:
        """Learn the order of a mixed sequence from how its two halves are put together."""
        if not self.mixed or self.text_first is not None or len(tensors) != 2:
            return
        first, second = (self._has_text_keys(tensor) for tensor in tensors)
        if first == second:
            first, second = (tensor.ndim > 2 and self.text in tensor.shape[1:-1] for tensor in tensors)
        # Where both are as long as the text, the queries say nothing and the keys decide.
        if first != second:
            self.text_first = first

    def _has_text_keys(self, tensor: torch.Tensor) -> bool:
        if self.text_keys is None:
            return False
        return tensor.untyped_storage().data_ptr() == self.text_keys.untyped_storage().data_ptr()

    def has(self, block: str) -> bool:
        """Whether the call has this block of the attention matrix (see `BLOCKS`)."""
        return self.mixed or block == (IMAGE_TO_TEXT if self.text else IMAGE_TO_IMAGE)

    def span(self, stream: str, total: int) -> slice:
        """Return where ``"image"`` or ``"text"`` stands among ``total`` queries or keys."""
        if not self.mixed:
            return slice(0, total)
        first = (stream == "text") == (self.text_first is not False)
        length = self.text if stream == "text" else total - self.text
        return slice(0, length) if first else slice(total - length, total)


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention layer of diffusers: it has a processor and a query projection."""
    return hasattr(module, "processor") and hasattr(module, "to_q")


def scope_of(path: str, kwargs: dict[str, Any], args: tuple[Any, ...], outer: dict[str, Any]) -> Scope:
    """Return the scope of an attention call.

    Args:
        path: the module's path.
        kwargs: its keyword arguments.
        args: its positional arguments.
        outer: the keyword arguments of the block around it, where single-stream blocks say how long
            the text is that they have already put in front of the image.
    """
    own = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    length = hidden.shape[1] if isinstance(hidden, torch.Tensor) and hidden.ndim == 3 else 0
    if isinstance(own, torch.Tensor) and own.ndim == 3:
        return Scope(path, own.shape[1], mixed=False, image=length)
    text, image = outer.get("encoder_hidden_states"), outer.get("hidden_states")
    if not isinstance(text, torch.Tensor) or not isinstance(image, torch.Tensor):
        return Scope(path)
    joined = text.ndim == image.ndim == 3 and length == text.shape[1] + image.shape[1]
    return Scope(path, text.shape[1], mixed=True, text_first=True) if joined else Scope(path)


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
