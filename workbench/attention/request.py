"""`Attention`: what of a run's attention is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from operator import index
from typing import TYPE_CHECKING, Any, cast

import torch

from workbench.attention.geometry import BLOCKS, IMAGE_TO_IMAGE, IMAGE_TO_TEXT, TEXT_TO_TEXT
from workbench.errors import InputError, RunStopped, UnknownNameError, nearest
from workbench.tracing.ledger import ALL
from workbench.tracing.steps import Steps, normal
from workbench.tracing.storage.unpacking import dtype_of

if TYPE_CHECKING:
    from workbench.attention.capture import Run
    from workbench.tracing.record import Record
    from workbench.tracing.session import Session

AXES, METHODS = ("heads", "layers", "steps"), ("mean", "max")
"""What can be reduced, and how."""


@dataclass
class Attention:
    """Asks a run for attention weights; give it in ``capture``.

    The maps are then ``record.attention``, an `AttentionMaps`; of several requests a tuple of them. The
    pipeline's own kernels compute the run; the weights are computed beside them from the same queries and
    keys, in float32. So they are those before an edit that changes what comes out, such as `Reweight` or
    `ForceMap`, and those behind one that changes queries or keys, such as `InjectAttention`.

    Attributes:
        sites: module paths of attention layers; None is every one that has the block.
        steps: which steps; None is every step.
        branch: which guidance branch; words are those of its text, of ``uncond`` the negative prompt's.
        dtype: how the maps are stored, by name (``"float16"``) or as torch's.
        block: whose queries look at whose keys: ``"image->text"``, ``"text->image"``, ``"image->image"`` or
            ``"text->text"``. Cross-attention has the first alone, self-attention the third.
        words: which of the text: words, phrases, places in the list of words, or ``(start, end)`` characters
            of the prompt; None is every token. Weights are of a softmax over all keys, whatever is chosen.
        queries: which queries of the image, as positions along them; None is all.
        pixels: in their place, points ``(x, y)`` of the picture, each from 0 to 1 from its upper left corner.
        heads: which heads; None is all.
        reduce: what is reduced while it streams, ``"mean"`` or ``"max"`` by ``"heads"``, ``"layers"`` and
            ``"steps"``; a list of these is the mean of each. Layers of one size are reduced first,
            then brought to the finest.
        top: keep the so many largest keys of each query and which they are; None is all.
        sample: of which of the run's samples.
        frame: of which of its frames, where each is attended to by itself (AnimateDiff); where attention is
            of all frames at once there is the first alone, which has them all.
        budget: bytes that the maps may take; None is a quarter of the memory that is free. A run that
            would need more stops in its first call, before anything is kept, with a narrower request.
    """

    sites: Sequence[str] | None = None
    steps: Steps = None
    branch: str = "cond"
    dtype: torch.dtype = torch.float32
    block: str = IMAGE_TO_TEXT
    words: Sequence[str | int | tuple[int, int]] | None = None
    queries: Sequence[int] | None = None
    pixels: Sequence[tuple[float, float]] | None = None
    heads: Sequence[int] | None = None
    reduce: Mapping[str, str] | Sequence[str] = ("heads",)
    top: int | None = None
    sample: int = 0
    frame: int = 0
    budget: int | None = None
    _runs: dict[int, Run] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Bring the choices into a plain form, and refuse what contradicts itself."""
        self.steps = normal(self.steps)
        self.reduce = _reductions(self.reduce)
        for name in ("sites", "words", "pixels", "queries", "heads"):
            self._listed(name)
        self._check_kinds()
        if self.block not in BLOCKS:
            raise UnknownNameError(
                f"Attention has no block {self.block!r}.{nearest(str(self.block), BLOCKS)}"
            )
        if self.branch in (ALL, "both"):
            raise InputError(
                f"branch={self.branch!r}: a map is of one branch. Ask twice, for 'cond' and 'uncond'."
            )
        if self.block == IMAGE_TO_IMAGE and "layers" in self.reductions:
            raise InputError(
                "Layers of other sizes have other queries in 'image->image', so they cannot be reduced. "
                "Leave 'layers' out of reduce."
            )
        if self.block == IMAGE_TO_IMAGE and self.words is not None:
            raise InputError("words chooses of the text, and no text is in 'image->image'. Leave it out.")
        if self.queries is not None and self.pixels is not None:
            raise InputError("queries and pixels choose the same thing. Give one of them.")
        if self.block not in (IMAGE_TO_TEXT, IMAGE_TO_IMAGE) and self.queries_chosen:
            raise InputError(f"The queries of {self.block!r} are text: choose them by words.")
        if not isinstance(self.frame, int) or self.frame < 0:
            raise InputError(f"frame={self.frame!r} is no frame. Frames are counted from 0.")
        if self.top is not None and (not isinstance(self.top, int) or self.top < 1):
            raise InputError(f"top={self.top!r} is no number of keys. Give 1 or more, or None for all.")
        if self.top is not None and set(self.reduce) - {"heads"}:
            raise InputError(
                "top keeps other keys at each step and layer, so those cannot be reduced as well: "
                "leave it out, or reduce heads alone."
            )
        if self.block == IMAGE_TO_TEXT and self.queries_chosen and "layers" in self.reduce:
            raise InputError(
                "Chosen queries do not lie on one grid, so layers cannot be reduced. Leave it out."
            )

    @property
    def queries_chosen(self) -> bool:
        """Whether only some of the image's queries are wanted."""
        return self.queries is not None or self.pixels is not None

    @property
    def over_heads(self) -> str | None:
        """``"mean"`` or ``"max"`` where heads are reduced."""
        return self.reductions.get("heads")

    @property
    def reductions(self) -> dict[str, str]:
        """``"mean"`` or ``"max"`` by axis."""
        return cast("dict[str, str]", self.reduce)

    @property
    def keys_are_text(self) -> bool:
        """Whether what is looked at is text."""
        return self.block in (IMAGE_TO_TEXT, TEXT_TO_TEXT)

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Watch the attention layers of a run."""
        from workbench.attention.capture import Run

        run = self._runs[id(session.record)] = Run(self, session)
        try:
            with run.watching():
                yield
        except BaseException as error:
            if not isinstance(error, RunStopped):
                del self._runs[id(session.record)]
            raise

    def deliver(self, record: Record) -> None:
        """Put the maps into the record."""
        run = self._runs.pop(id(record), None)
        if run is None:
            return
        add_maps(record, run.maps())
        run.let_go()

    def _check_kinds(self) -> None:
        """Refuse what is of no kind that fits, before a run is under way."""
        self.dtype = dtype_of(self.dtype)
        if not self.dtype.is_floating_point:
            raise InputError(
                f"dtype={self.dtype}: weights lie from 0 to 1. Give a floating one, as 'float16'."
            )
        for name in ("queries", "heads"):
            given = getattr(self, name)
            try:
                setattr(self, name, given and tuple(map(index, given)))
            except TypeError:
                raise InputError(f"{name}={list(given)} takes integers.") from None
        if self.heads is not None and len(set(self.heads)) < len(self.heads):
            raise InputError(f"heads={list(self.heads)} names one twice.")
        for each in self.sites or ():
            if not isinstance(each, str):
                raise InputError(f"sites takes paths of attention layers; {each!r} is none.")
        try:
            self.pixels = self.pixels and tuple((float(x), float(y)) for x, y in self.pixels)
        except (TypeError, ValueError):
            raise InputError(
                f"pixels takes points (x, y), each from 0 to 1; {self.pixels!r} are none."
            ) from None
        if self.budget is not None and (not isinstance(self.budget, Real) or self.budget < 0):
            raise InputError(f"budget={self.budget!r} is no number of bytes, such as 2**30.")
        try:
            self.sample = index(self.sample)
        except TypeError:
            raise InputError(f"sample={self.sample!r} is no sample. Samples are counted from 0.") from None

    def _listed(self, name: str) -> None:
        given = getattr(self, name)
        if given is None:
            return
        if isinstance(given, (str, int, float)):
            raise InputError(f"{name} takes a list: {name}=[{given!r}].")
        if not len(given):
            raise InputError(f"{name} is empty, so nothing would be kept. Leave it out for all.")
        setattr(self, name, tuple(given))


def add_maps(record: Record, maps: Any) -> None:
    """Put maps into a record, which has a tuple of them where several were asked for."""
    before = record.attention
    if before is None:
        record.attention = maps
    else:
        record.attention = (*(before if isinstance(before, tuple) else (before,)), maps)


def _reductions(asked: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    if asked is None or isinstance(asked, str):
        raise InputError(f"reduce takes a list or a dict: reduce={[asked] if asked else []!r}.")
    found = dict(asked) if isinstance(asked, Mapping) else dict.fromkeys(asked, "mean")
    for axis, how in found.items():
        if axis not in AXES:
            raise UnknownNameError(f"reduce has no axis {axis!r}.{nearest(axis, AXES)}")
        if how not in METHODS:
            raise UnknownNameError(f"reduce of {axis} by {how!r}?{nearest(how, METHODS)}")
    if len({found[axis] for axis in ("layers", "steps") if axis in found}) > 1:
        raise InputError("layers and steps are reduced together, so by one method: mean or max.")
    return found
