"""What every intervention has: sites, steps, a branch, and a new value for what passes there."""

from __future__ import annotations

import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from workbench.attention.maps import resize
from workbench.errors import InputError, NotFiniteError
from workbench.tracing.ledger import ALL, Row
from workbench.tracing.sites import Site
from workbench.tracing.steps import Steps, branch_rows, covers, normal
from workbench.tracing.structure import describe

BY_HEAD = ("heads", "text_heads", "query", "key", "value", "probs")
"""Ports whose values are ``(batch, heads, …)``."""


_SIDES = [2**level for level in range(8)]
"""How many latents a side a place of a sequence may stand for."""

_OF_TEXT = re.compile(
    r"encoder_hidden_states|text|caption|add_[qkv]_proj|to_add_out|(attn2|cross_attn)(\.to_[kv]|:key|:value)"
)
"""Sites of the text, where it is as long as the picture."""

_OF_FRAMES = re.compile(r"temp|motion")
"""Sites whose sequences go from frame to frame."""

Places = int | Iterable[int] | Callable[[int], Iterable[int]] | None
"""Places of a sequence, or what returns them when it is told how long it is."""


@dataclass(frozen=True)
class Intervention(ABC):
    """A change at one site.

    Attributes:
        site: where, spelled ``unet.mid_block`` or ``unet.mid_block:input``.
        steps: which steps; None is every step. Negative ones count from the end.
        branch: which guidance branch; ``"all"`` is every row of the call.
        heads: which heads of an attention layer, at a site whose values have them: ``…attn2:heads``. None is
            every head; the others stay as they are.
        samples: which samples of the batch, as the images are numbered: the first prompt with all its
            images, then the next; negative ones count from the end. None is every sample. The others'
            values stay as they are, to the bit.
        tokens: which places of a sequence, counted from 0, at a site whose values are ``(batch, tokens,
            width)`` or have heads; the others stay as they are, to the bit. None is every place. What can be
            called is told how long the sequence is, and returns them.
        mask: how much of the change each place of the picture gets, in [0, 1], ``(rows, columns)`` of the
            whole picture, at any size. At a site whose values are ``(batch, tokens, width)`` or have heads
            the tokens are those of the picture, row by row; a sequence with text in it takes no mask.
        strength: how much of the change is made: 1 is all of it, 0 is none, 2 goes as far again.
    """

    site: str
    steps: Steps = None
    branch: str = ALL
    heads: int | Iterable[int] | None = field(default=None, kw_only=True)
    samples: int | Iterable[int] | None = field(default=None, kw_only=True)
    tokens: Places = field(default=None, kw_only=True)
    mask: torch.Tensor | None = field(default=None, kw_only=True, repr=False, compare=False)
    strength: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        self._check_site()
        object.__setattr__(self, "steps", normal(self.steps))
        if not isinstance(self.branch, str) or not self.branch:
            raise InputError(f"branch={self.branch!r} is not a branch. Give 'all', 'cond' or 'uncond'.")
        for name in ("samples", "heads", "tokens"):
            asked = getattr(self, name)
            if asked is not None and not callable(asked):
                object.__setattr__(self, name, numbers(name, asked))
        check_number("strength", self.strength)
        if self.mask is not None:
            check_mask(self.mask, "mask")

    def _check_site(self) -> None:
        site = Site.parse(self.site)
        if self.heads is not None and site.port not in BY_HEAD:
            raise InputError(
                f"{site} has no heads to choose from. The ports {', '.join(BY_HEAD)} of an attention layer "
                "have them, such as '….attn2:heads'."
            )

    @property
    def sites(self) -> tuple[Site, ...]:
        """The site, parsed."""
        return (Site.parse(self.site),)

    def apply(self, site: Site, value: torch.Tensor, row: Row | None, total: int | None) -> torch.Tensor:
        """Return the value to go on with; ``value`` itself when this is not its moment."""
        if row is None or not covers(self.steps, row, total):  # type: ignore[arg-type]
            return value
        parts = branch_rows(row, self.branch, value.shape[0])
        if not parts:
            return value
        changed = value.clone()
        for branch, rows in parts:
            # Written into a clone, so that strides, and with them the kernels downstream, stay the same.
            part = changed[rows]
            chosen = slice(None) if self.samples is None else row.rows_of(self.samples, len(part))  # type: ignore[arg-type]
            part[chosen] = self._changed(site, part[chosen], row, branch)
        return changed

    def place(self, site: Site, value: torch.Tensor, tokens: Places = None) -> tuple[Any, ...]:
        """Return where in the rows of a value the change is made, as an index of it.

        Args:
            site: where the value passes.
            value: ``(rows, ...)``.
            tokens: which places, if not the intervention's own.

        Raises:
            InputError: the value has no such head, or no such place of a sequence.
        """
        by_head = site.port in BY_HEAD
        heads = None if self.heads is None else check_heads(self.heads, value.shape[1], site=str(site))
        asked = self.tokens if tokens is None else tokens
        if asked is None:
            return (slice(None),) if heads is None else (slice(None), heads)
        if not by_head and value.ndim != 3:
            raise InputError(
                f"{site} has values of {describe(value)}, which are no sequence, so tokens choose nothing. "
                "Take a site whose values are (batch, tokens, width), or a mask for a picture."
            )
        length = value.shape[2 if by_head else 1]
        places = numbered(asked(length) if callable(asked) else asked, length, what="places", site=str(site))
        if not by_head:
            return (slice(None), places)
        return (slice(None), slice(None) if heads is None else torch.tensor(heads)[:, None], places)

    def _changed(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return one branch's rows with the change, where and as far as it is asked for."""
        if self.heads is None and self.tokens is None:
            new = self.new_value(site, value, row, branch)
        else:
            place, new = self.place(site, value), value.clone()
            new[place] = self.new_value(site, value[place], row, branch)
        if self.strength != 1:
            new = value + self.strength * (new - value)
        if self.mask is not None:
            share = spread(self.mask, value, row, site=str(site))
            new = torch.where(share == 1, new, value + share * (new - value))
        if not torch.isfinite(new).all() and torch.isfinite(value).all():
            raise NotFiniteError(
                f"{type(self).__name__} at {site} makes values that are not finite, in step {row.step}, "
                f"branch {branch!r}; it was handed {describe(value)} of finite ones. Look at its strength, "
                "factor or module."
            )
        return new

    @abstractmethod
    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:
        """Return the new value of one branch's rows, ``(rows, ...)``."""


def check_heads(heads: int | Iterable[int], count: int, *, site: str) -> list[int]:
    """Return heads counted from 0, of a layer that has ``count``.

    Raises:
        InputError: it has no such head.
    """
    return numbered(heads, count, what="heads", site=site)


def numbered(asked: int | Iterable[int], count: int, *, what: str, site: str) -> list[int]:
    """Return numbers of ``count`` things at a site, counted from 0.

    Raises:
        InputError: one is not there, or is named twice.
    """
    chosen = list(asked) if isinstance(asked, Iterable) else [asked]
    for each in chosen:
        if not -count <= each < count:
            raise InputError(f"{site} has {count} {what} (0 to {count - 1}); {each} is none of them.")
    found = [each % count for each in chosen]
    if len(set(found)) < len(found):
        raise InputError(f"{what}={chosen} names one of {site} twice.")
    return found


def check_number(name: str, value: object) -> None:
    """Refuse what is no finite number.

    Raises:
        InputError: with the name and what was given.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name}={value!r} is no finite number.")


def check_mask(mask: object, name: str) -> None:
    """Refuse what says nothing about places of a picture.

    Raises:
        InputError: it is no tensor of ``(rows, columns)``, or goes beyond 0 and 1.
    """
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not mask.numel():
        raise InputError(f"{name} is a tensor of weights, (rows, columns), of the whole picture.")
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise InputError(f"The weights of {name} go from 0 to 1; these go from {mask.min()} to {mask.max()}.")


def spread(mask: torch.Tensor, value: torch.Tensor, row: Row, *, site: str) -> torch.Tensor:
    """Return a mask of the picture at the size that a value has, so that the two can be multiplied.

    Args:
        mask: ``(rows, columns)``, in [0, 1].
        value: ``(batch, channels, rows, columns)``, the same with frames before the rows, ``(batch, places,
            width)`` or ``(batch, heads, places, width)`` with the places of the picture row by row.
        row: the denoiser's call, which knows the size of the latents.
        site: named where it does not fit.

    Raises:
        InputError: the value is no picture, or a sequence in which text stands.
    """
    by_head = Site.parse(site).port in BY_HEAD
    if value.ndim == 3 or by_head:
        shape, frames = _lying(value.shape[-2], row, site)
        share = resize(mask.float(), shape).flatten().repeat(frames)
        return share[:, None].to(value.device, value.dtype)
    if value.ndim < 4:
        raise InputError(f"{site} has values of {describe(value)}, which are no picture for a mask.")
    return resize(mask.float(), tuple(value.shape[-2:])).to(value.device, value.dtype)


def _lying(places: int, row: Row, site: str) -> tuple[tuple[int, int], int]:
    """Return the rows and columns that the places of a sequence form, and of how many frames."""
    if row.picture is None:
        raise InputError(
            f"How the {places} places of {site} lie in the picture is not known: {row.component} is not told "
            "it. Choose them with tokens, or take a site whose values are (batch, channels, rows, columns)."
        )
    *film, rows, columns = row.picture
    thinned = {math.ceil(count / by) for count in (1, *film) for by in (1, 2, 4)}
    sizes = [(math.ceil(rows / side), math.ceil(columns / side)) for side in _SIDES]
    found = [(size, many) for size in sizes for many in sorted(thinned) if size[0] * size[1] * many == places]
    if places in row.texts and (not found or _OF_TEXT.search(site)):
        raise InputError(
            f"The {places} places of {site} are the tokens of a text, and a mask is of the picture. Choose "
            "them with tokens (or words, in an experiment)."
        )
    if not found or (film and _OF_FRAMES.search(site)):
        joined = "".join(
            f" It may be a text of {text} and the picture in one."
            for text in row.texts
            if any(places - text == size[0] * size[1] for size in sizes)
        )
        raise InputError(
            f"The {places} places of {site} form no picture of {rows} by {columns} latents.{joined} Choose "
            "them with tokens, or mask another site."
        )
    return found[0]


def numbers(name: str, asked: int | Iterable[int]) -> tuple[int, ...]:
    """Return a choice of numbers as a tuple.

    Raises:
        InputError: it is none, is empty, or names one twice.
    """
    try:
        chosen = tuple(operator.index(each) for each in (asked if isinstance(asked, Iterable) else (asked,)))
    except TypeError:
        raise InputError(f"{name}={asked!r} does not number {name}. Give 0, a range or a list.") from None
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"{name}={asked!r} is empty or names one twice. Leave it out for all of them.")
    return chosen
