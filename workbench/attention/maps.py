"""Attention maps of a run: how much each place of the image attends to each token of the text, and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from workbench.attention.geometry import IMAGE_TO_IMAGE, IMAGE_TO_TEXT, TEXT_TO_TEXT, grid
from workbench.attention.words import Word, find
from workbench.errors import InputError, UnknownNameError, nearest
from workbench.tracing.ledger import Row

Asked = str | int | tuple[int, int]
"""A word or phrase, its place in ``words``, or ``(start, end)`` characters of the prompt."""


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights of one block of the matrix.

    Attributes:
        layers: by module path, the weights ``(calls, tokens, places)``, float; with ``heads`` after the
            calls where they are kept apart. The tokens are the text's and the places the image's, whichever
            of them looks at the other; of ``image->image`` the tokens are its queries and the places its
            keys, of ``text->text`` likewise. A query's weights over all its keys sum to 1, in joint
            attention those of image and text together.
        rows: the ledger rows of the calls.
        words: the words along the token axis.
        layer_rows: the rows of a layer that did not run in all of these calls: of two denoisers that
            take turns, each has its own.
        text: all words of the text, as they stand in it.
        block: whose queries look at whose keys.
        reduced: what was reduced, ``"mean"`` or ``"max"`` by axis.
        heads: the heads that are kept apart; None is all of them, or none where they are reduced.
        places: by layer, which of the image's queries were chosen; empty is all.
        top: how many of each query's largest keys were kept; None is all.
        indices: by layer, which keys those are, of the same shape as the weights.
        keys: by layer, how many keys there were to choose from.
    """

    layers: dict[str, torch.Tensor]
    rows: Sequence[Row]
    words: Sequence[Word]
    layer_rows: Mapping[str, Sequence[Row]] = field(default_factory=dict)
    text: Sequence[Word] = ()
    block: str = IMAGE_TO_TEXT
    reduced: Mapping[str, str] = field(default_factory=lambda: {"heads": "mean"})
    heads: tuple[int, ...] | None = None
    places: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    top: int | None = None
    indices: Mapping[str, torch.Tensor] = field(default_factory=dict)
    keys: Mapping[str, int] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were kept."""
        return tuple(sorted({row.step for row in self.rows}))

    def rows_of(self, layer: str) -> Sequence[Row]:
        """Return the ledger rows of one layer's calls."""
        return self.layer_rows.get(layer, self.rows)

    def map(
        self,
        word: Asked,
        *,
        size: tuple[int, int],
        step: int | None = None,
        layer: str | None = None,
        head: int | None = None,
    ) -> torch.Tensor:
        """Return one word's map.

        Args:
            word: the word, or its place in ``words``; a word of several tokens has their sum.
            size: ``(width, height)`` of the image, whose shape says how its places lie.
            step: which step; None is the mean over all that were kept.
            layer: one attention module's path; None is the mean over all, each brought to the finest.
            head: one head, where they are kept apart; None is their mean.

        Returns:
            Weights in [0, 1], ``(rows, columns)``.

        Raises:
            UnknownNameError: no such word or layer.
            InputError: no such step or head, or what was kept is no picture.
        """
        if self.block in (IMAGE_TO_IMAGE, TEXT_TO_TEXT):
            raise InputError(f"{self.block} has no map of a word. Use map_from(…), or layers[…].")
        if self.places:
            raise InputError("Of chosen queries there is no picture. Read layers[…], or keep all queries.")
        columns = list(find(self.words, word).columns)
        chosen = self.chosen(layer, step)
        return mean_map(
            [as_image(self._tokens(name, calls, head)[columns].sum(0), size) for name, calls in chosen]
        )

    def map_from(
        self,
        x: float,
        y: float,
        *,
        size: tuple[int, int],
        step: int | None = None,
        layer: str | None = None,
        head: int | None = None,
    ) -> torch.Tensor:
        """Return what a point of the picture attends to in the picture; of ``image->image``.

        Args:
            x: from 0 to 1 from the left. Where queries were chosen, the nearest of them is taken.
            y: from 0 to 1 from the top.
            size: ``(width, height)`` of the image.
            step: which step; None is the mean over all that were kept.
            layer: one attention module's path; None is the mean over all, each brought to the finest.
            head: one head, where they are kept apart; None is their mean.

        Returns:
            Weights in [0, 1], ``(rows, columns)``.

        Raises:
            UnknownNameError: no such layer.
            InputError: another block was kept; no such step or head.
        """
        if self.block != IMAGE_TO_IMAGE:
            raise InputError(
                f"{self.block} was kept; ask for Attention(block='image->image', pixels=[({x}, {y})])."
            )
        maps = []
        for name, calls in self.chosen(layer, step):
            weights = self._tokens(name, calls, head)
            shape = _shape(weights.shape[-1], size)
            kept = torch.tensor(self.places.get(name, tuple(range(weights.shape[0]))))
            rows, columns = (kept // shape[1] + 0.5) / shape[0], (kept % shape[1] + 0.5) / shape[1]
            nearest_one = ((rows - y) ** 2 + (columns - x) ** 2).argmin()
            maps.append(as_image(weights[nearest_one], size))
        return mean_map(maps)

    def whole(self, layer: str) -> torch.Tensor:
        """Return a layer's weights with every key; of those that were not kept (see ``top``), 0."""
        if layer not in self.layers:
            raise UnknownNameError(f"No attention map of {layer!r}.{nearest(layer, self.layers)}")
        values = self.layers[layer]
        if self.top is None:
            return values
        axis = -2 if self.block == IMAGE_TO_TEXT else -1
        shape = [*values.shape]
        shape[axis] = self.keys[layer]
        return values.new_zeros(shape).scatter(axis, self.indices[layer], values)

    def _tokens(self, layer: str, calls: Sequence[int], head: int | None) -> torch.Tensor:
        """Return the mean over some calls of a layer's weights, ``(tokens, places)`` float32."""
        values = self.whole(layer)[list(calls)].float().mean(0)
        if "heads" in self.reduced:
            if head is not None:
                raise InputError(f"Heads were reduced, so there is no head {head}. Ask with reduce=[].")
            return values
        kept = self.heads or tuple(range(values.shape[0]))
        if head is not None and head not in kept:
            raise InputError(
                f"Head {head} of {layer} was not kept. Heads that were: {', '.join(map(str, kept))}."
            )
        return values.mean(0) if head is None else values[kept.index(head)]

    def chosen(self, layer: str | None, step: int | None) -> list[tuple[str, list[int]]]:
        """Return which layers, and of each which calls, are meant.

        Args:
            layer: one module's path; None is all.
            step: one step, of which the last call counts; None is all that were kept.

        Raises:
            UnknownNameError: no such layer.
            InputError: no such step, or nothing was kept.
        """
        if layer is not None and layer not in self.layers:
            raise UnknownNameError(f"No attention map of {layer!r}.{nearest(layer, self.layers)}")
        if not self.layers:
            raise InputError("No attention was kept in this run.")
        names = [layer] if layer is not None else list(self.layers)
        found = [(name, self._calls(name, step)) for name in names]
        found = [(name, calls) for name, calls in found if calls]
        if not found:
            kept = ", ".join(map(str, self.steps)) or "none"
            raise InputError(f"No attention was kept at step {step}. Steps that were kept: {kept}.")
        return found

    def _calls(self, layer: str, step: int | None) -> list[int]:
        if "steps" in self.reduced:
            if step is not None:
                raise InputError(f"Steps were reduced, so there is no step {step}. Leave it out.")
            return [0]
        if step is None:
            return list(range(len(self.layers[layer])))
        found = [index for index, row in enumerate(self.rows_of(layer)) if row.step == step]
        return found[-1:]


def mean_map(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the mean of ``(rows, columns)`` maps, each brought to the finest."""
    finest = max((tuple(each.shape) for each in maps), key=lambda shape: shape[0] * shape[1])
    return torch.stack([resize(each, finest) for each in maps]).mean(0)


def as_image(weights: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Lay ``(places,)`` out as the image's ``(rows, columns)``."""
    return weights.float().reshape(_shape(weights.shape[-1], size))


def resize(image: torch.Tensor, shape: tuple[int, ...], mode: str = "bilinear") -> torch.Tensor:
    """Resize ``(rows, columns)``, bilinearly or by another mode of `torch.nn.functional.interpolate`."""
    if tuple(image.shape) == tuple(shape):
        return image
    return functional.interpolate(image[None, None], size=shape, mode=mode, align_corners=False)[0, 0]


def _shape(places: int, size: tuple[int, int]) -> tuple[int, int]:
    shape = grid(places, *size)
    if shape is None:
        raise InputError(f"{places} queries do not lie on an image of {size[0]}×{size[1]}.")
    return shape
