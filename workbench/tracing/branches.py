"""Which guidance branches a denoiser call computes, and in which order its rows have them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.errors import UnknownNameError, nearest
from workbench.tracing.ledger import ALL, GUIDED
from workbench.tracing.rig import Rig
from workbench.tracing.structure import leaves
from workbench.tracing.system import System, kind_of, taken

_BOTH = "cond_uncond"
_MOST = 16
_NAMED = (ALL, "cond", "uncond", "image", "perturbed", "both", GUIDED)
"""What branches are called where nobody says otherwise, and ways to ask for several."""

_COND_FIRST = {
    *(
        "DiTTransformer2DModel",
        "LuminaNextDiT2DModel",
        "OmniGenTransformer2DModel",
        "ZImageTransformer2DModel",
    ),
    *("StableCascadeUNet", "WuerstchenPrior", "WuerstchenDiffNeXt"),
}
"""Denoisers whose pipelines in diffusers put the conditional half of a guided batch first."""


@dataclass(frozen=True)
class _Encoding:
    """What a text encoder made of some tokens: its top-level outputs, of the first row."""

    tokens: torch.Tensor
    values: list[torch.Tensor]


class Branches:
    """Names the branches of each call.

    A pipeline's own label comes first (``cache_context``). Without one, a batch of several times the
    samples holds several branches, and separate calls of one tick follow each other, cond first
    unless the words tell. What is ``given`` for a loop written by hand counts before all but the label.

    Attributes:
        rows: how many samples the run makes.
        label: the pipeline's name for what it computes now, or None.
    """

    def __init__(
        self, system: System, rows: int | None, prompt: Any = None, *, given: Sequence[str] | None = None
    ) -> None:
        self.rows = rows
        self.label: str | None = None
        self._system = system
        self._prompt = prompt[0] if isinstance(prompt, (list, tuple)) and prompt else prompt
        self._encodings: list[_Encoding] = []
        self._given = None if given is None else tuple(given)
        self._orders: dict[str, tuple[str, ...]] = {}
        self._several = False

    def attach(self, rig: Rig) -> None:
        """Watch what the text encoders make of the words: it tells the branches of a batch apart."""
        for part in self._system.components.values():
            if isinstance(part, nn.Module) and "input_ids" in taken(type(part)):
                rig.after(part, self._encoded)

    def of(
        self, component: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], earlier: int
    ) -> tuple[str, ...]:
        """Return the branches of one call, in the order of its rows.

        Args:
            component: the denoiser.
            args: what it is called with, the sample first.
            kwargs: likewise.
            earlier: how many calls of the same tick there were before.
        """
        if self.label is not None and self.label != _BOTH:
            return (self.label.removeprefix("pred_"),)
        self._several = self._several and earlier > 0
        sample = args[0] if args else next(iter(kwargs.values()), None)
        batch = _count(sample)
        if self.rows is not None and batch % self.rows == 0 and batch > self.rows:
            if component not in self._orders:
                self._orders[component] = self._order(component, args, kwargs, batch // self.rows)
            self._several = True
            return self._orders[component]
        if self._several:
            # One more way of guidance after a call of several: with layers skipped, in SD3.
            return (f"guide{earlier}",)
        if self._given is not None:
            return (self._given[earlier] if earlier < len(self._given) else f"guide{earlier}",)
        spoken = self._spoken(args, kwargs)
        if spoken is not None:
            return ("cond" if spoken else "uncond",)
        if self._system.by_hand and _conditioned(args, kwargs):
            return (f"guide{earlier}",)
        return (("cond", "uncond")[earlier] if earlier < 2 else f"guide{earlier}",)

    def _order(
        self, component: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], ways: int
    ) -> tuple[str, ...]:
        """Name the equal parts of a guided batch, in their order.

        Perturbed-attention guidance adds a last part, whose attention is perturbed (Ahn et al., 2024).
        """
        if self._given is not None and len(self._given) == ways:
            return self._given
        if getattr(self._system.call, "do_perturbed_attention_guidance", False):
            return (*self._unperturbed(component, args, kwargs, ways - 1), "perturbed")
        return self._unperturbed(component, args, kwargs, ways)

    def _unperturbed(
        self, component: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], ways: int
    ) -> tuple[str, ...]:
        """Name the parts of a batch that are guided by conditions.

        Of two, most pipelines put the unconditional one first. Guidance by words and an image has three: one
        with both, one without the words, one without either (Brooks et al., 2023).
        """
        rows = self.rows or 1
        if ways == 1:
            return ("cond",)
        worded = self._worded(args, kwargs, rows, ways)
        kind = kind_of(self._system.denoisers.get(component)).__name__
        if ways == 2:
            first = _null_class_last(kwargs.get("class_labels"), rows) or worded == [True, False]
            if self._system.by_hand and not first and not any(worded):
                return ("guide0", "guide1")
            first = first or (kind in _COND_FIRST and not any(worded))
            return ("cond", "uncond") if first else ("uncond", "cond")
        if ways == 3 and kind == "OmniGenTransformer2DModel":
            return ("cond", "uncond", "image")
        blank = _blank(args, kwargs, rows, ways)
        if ways == 3 and worded.count(True) == blank.count(True) == 1 and worded != blank:
            return tuple(
                "cond" if words else "uncond" if nothing else "image"
                for words, nothing in zip(worded, blank, strict=True)
            )
        return tuple(f"guide{way}" for way in range(ways))

    def _worded(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, ways: int) -> list[bool]:
        """Return which parts of a batch are conditioned on the prompt; of all the same, none."""
        known = list(self._of_prompt())
        for _, told in leaves((args, kwargs)):
            if not known or told.ndim < 2 or told.shape[0] != ways * rows or not told.is_floating_point():
                continue
            found = [any(_same(told[way * rows], each) for each in known) for way in range(ways)]
            if any(found) and not all(found):
                return found
        return [False] * ways

    def _spoken(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool | None:
        """Return whether a call of one branch has the prompt, or other words; None if unknown."""
        known = list(self._of_prompt())
        others = [value for each in self._encodings for value in each.values]
        for _, told in leaves((args, kwargs)):
            if not known or told.ndim < 2 or not told.is_floating_point():
                continue
            if any(_same(told[0], each) for each in known):
                return True
            if any(_same(told[0], each) for each in others):
                return False
        return None

    def _of_prompt(self) -> Iterator[torch.Tensor]:
        """Yield what the encoders made of the prompt, first row."""
        if not isinstance(self._prompt, str):
            return
        spelled = [
            list(part(self._prompt, add_special_tokens=False, verbose=False)["input_ids"])
            for part in self._system.components.values()
            if callable(part) and hasattr(part, "model_max_length")
        ]
        for encoding in self._encodings:
            if any(_within(words, encoding.tokens.tolist()) for words in spelled):
                yield from encoding.values

    def _encoded(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, torch.Tensor) and ids.ndim == 2 and len(self._encodings) < _MOST:
            values = [each[0].detach() for leaf, each in leaves(output) if len(leaf) <= 1 and each.ndim > 1]
            self._encodings.append(_Encoding(ids[0], values))


def _count(sample: Any) -> int:
    """Return how many samples a denoiser is handed; some take them as a list."""
    if isinstance(sample, (list, tuple)):
        return len(sample)
    return sample.shape[0] if isinstance(sample, torch.Tensor) and sample.ndim else 1


def check_branch(branch: str, denoisers: Iterable[Any], given: Sequence[str] | None = None) -> None:
    """Refuse, before a run, a branch that it cannot have.

    Where denoisers take labels from the pipeline, any name may come.

    Args:
        branch: what is asked for.
        denoisers: of the run.
        given: names that the author of a loop said.

    Raises:
        UnknownNameError: with the names there are.
    """
    known = (*_NAMED, *(given or ()))
    labelled = any(hasattr(each, "cache_context") for each in denoisers)
    if not labelled and branch not in known and re.fullmatch(r"guide\d+", branch) is None:
        raise UnknownNameError(f"There is no branch {branch!r}.{nearest(branch, known)}")


def _null_class_last(labels: Any, rows: int) -> bool:
    """Whether the second half of a guided batch is without a class: the null class is the highest."""
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or len(labels) != 2 * rows:
        return False
    return bool(labels[:rows].max() < labels[rows:].min())


def _conditioned(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a denoiser is handed more than a sample and a time."""
    return sum(each.ndim > 1 and each.is_floating_point() for _, each in leaves((args, kwargs))) > 1


def _blank(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, ways: int) -> list[bool]:
    """Return which parts of a batch are handed channels of zeros beside the sample's: an image left out."""
    sample = args[0] if args else next(iter(kwargs.values()))
    if not isinstance(sample, torch.Tensor) or sample.ndim < 2:
        return [False] * ways
    channels = sample.reshape(ways, rows, sample.shape[1], -1)[:, 0]
    return [bool((each == 0).all(-1).any()) for each in channels]


def _same(told: torch.Tensor, encoding: torch.Tensor) -> bool:
    return told.numel() == encoding.numel() and torch.equal(
        told.flatten(), encoding.flatten().to(told.device, told.dtype)
    )


def _within(words: list[int], tokens: list[int]) -> bool:
    return bool(words) and any(
        tokens[start : start + len(words)] == words for start in range(len(tokens) - len(words) + 1)
    )
