"""What attention would take, known from the first call: bytes and seconds, by layer and in all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from workbench.attention.geometry import IMAGE_TO_IMAGE, IMAGE_TO_TEXT
from workbench.attention.reduction import ALL_LAYERS
from workbench.attention.request import Attention
from workbench.errors import InputError
from workbench.tracing.memory import free_memory

_SHARE_OF_MEMORY = 0.25

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class LayerCost:
    """One layer's attention in one call.

    Attributes:
        path: the module's path.
        heads: how many heads it has.
        queries: how many queries there are in all, image and text.
        keys: how many keys.
        width: of a head.
        tokens: how many tokens of the maps' first axis are wanted.
        places: how many places of the second.
        seconds: what computing them took; None where they were not computed.
    """

    path: str
    heads: int
    queries: int
    keys: int
    width: int
    tokens: int
    places: int
    seconds: float | None = None

    @property
    def products(self) -> int:
        """Multiplications of its whole matrix."""
        return self.heads * self.queries * self.keys * self.width


@dataclass
class Plan:
    """What a request comes to in a run.

    Attributes:
        asked: the request.
        calls: how many calls of each denoiser it covers.
        budget: bytes that its maps may take.
        layers: the layers as they were met.
    """

    asked: Attention
    calls: int
    budget: int
    layers: list[LayerCost] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """What the maps take in memory when the run is over.

        Beside them there are, while the denoiser runs, up to 1 MiB of queries and keys that wait to be
        computed together, and of the layer at hand its queries, keys and maps in float32, with weights of 32
        MiB at a time.
        """
        return bytes_of(self.asked, self.layers, self.calls)

    @property
    def seconds(self) -> float:
        """What computing them adds to the run; what was not measured is reckoned from what was."""
        return self.calls * _most((path, each) for path, _, each in self._costs())

    @property
    def fits(self) -> bool:
        """Whether it is within the budget."""
        return self.bytes <= self.budget

    def narrower(self) -> Attention | None:
        """Return the least narrowed request that fits the budget; None if none of the usual ones does."""
        fitting = (
            each for each in _narrowed(self.asked) if bytes_of(each, self.layers, self.calls) <= self.budget
        )
        return next(fitting, None)

    def check(self) -> None:
        """Refuse a request over its budget.

        Raises:
            InputError: with what it takes and a request that fits.
        """
        if self.fits:
            return
        smaller = self.narrower()
        instead = "Choose sites, steps or words, or give a larger budget."
        if smaller is not None:
            needed = human(bytes_of(smaller, self.layers, self.calls))
            instead = f"{spelled(smaller)} would take {needed}. {instead}"
        raise InputError(
            f"{spelled(self.asked)} takes {human(self.bytes)} in {len(self.layers)} layers and {self.calls} "
            f"calls, and its budget is {human(self.budget)}: nothing was kept. {instead}"
        )

    def __str__(self) -> str:
        """Return a line a layer and one for all."""
        width = max([len(path) for path, _, _ in self._costs()], default=5)
        lines = [f"{'layer':<{width}}  {'bytes':>10}  {'seconds':>8}"]
        for path, size, seconds in self._costs():
            lines.append(f"{path:<{width}}  {human(size):>10}  {seconds * self.calls:>8.2f}")
        lines.append(f"{'in all':<{width}}  {human(self.bytes):>10}  {self.seconds:>8.2f}")
        state = "fits" if self.fits else "is over"
        return "\n".join([*lines, f"{self.calls} calls; {state} the budget of {human(self.budget)}"])

    def _costs(self) -> list[tuple[str, int, float]]:
        """Return each layer's path, bytes in the run if it were alone, and seconds a call."""
        measured = [each for each in self.layers if each.seconds is not None]
        products = sum(each.products for each in measured)
        rate = sum(each.seconds or 0.0 for each in measured) / products if products else 0.0
        return [
            (
                each.path,
                bytes_of(self.asked, [each], self.calls),
                each.products * rate if each.seconds is None else each.seconds,
            )
            for each in self.layers
        ]


def default_budget() -> int:
    """Return a quarter of the memory that is free, in bytes."""
    return int(free_memory() * _SHARE_OF_MEMORY)


def bytes_of(asked: Attention, layers: Sequence[LayerCost], calls: int) -> int:
    """Return the bytes that a request's maps take.

    Args:
        asked: the request.
        layers: one call's layers.
        calls: how many calls.
    """
    reduced = asked.reductions
    stored = torch.empty((), dtype=asked.dtype).element_size()
    # What is added up is float32 until it is done.
    size = 4 if {"steps", "layers"} & set(reduced) else stored
    indices = 8 if asked.top is not None else 0
    counted: dict[tuple[str, int, int], int] = {}
    for layer in layers:
        heads = 1 if asked.over_heads else len(asked.heads or range(layer.heads))
        tokens, places = layer.tokens, layer.places
        if asked.top is not None and asked.block == IMAGE_TO_TEXT:
            tokens = min(asked.top, tokens)
        elif asked.top is not None:
            places = min(asked.top, places)
        name = ALL_LAYERS if "layers" in reduced else layer.path
        counted[name, tokens, places] = heads * tokens * places * (size + indices)
    if "steps" in reduced:
        return sum(counted.values())
    return calls * _most((path, size) for (path, *_), size in counted.items())


def _most(of_layers: Iterable[tuple[str, T]]) -> T | int:
    """Return what a call comes to at most: it is of one component, and so are the layers in it."""
    components: dict[str, Any] = defaultdict(int)
    for path, each in of_layers:
        components[path.partition(".")[0]] += each
    return max(components.values(), default=0)


def human(size: float) -> str:
    """Return bytes as people write them."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def spelled(asked: Attention) -> str:
    """Return a request as code, without what is as usual."""
    usual = Attention()
    names = (
        "block",
        "sites",
        "steps",
        "branch",
        "words",
        "queries",
        "pixels",
        "heads",
        "reduce",
        "top",
        "sample",
        "frame",
        "dtype",
    )
    given = [
        f"{name}={_value(getattr(asked, name))}"
        for name in names
        if getattr(asked, name) != getattr(usual, name)
    ]
    return f"Attention({', '.join(given)})"


def _value(value: object) -> str:
    if isinstance(value, dict):
        means = set(value.values()) <= {"mean"}
        return repr(list(value)) if means else repr(value)
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}…"


def _narrowed(asked: Attention) -> Iterator[Attention]:
    """Give narrower requests, each of them narrower than the one before."""
    narrow = asked
    if asked.dtype == torch.float32:
        narrow = replace(narrow, dtype=torch.float16)
        yield narrow
    for axis in ("heads", "steps", "layers"):
        reduced = narrow.reductions
        how = reduced.get("steps", reduced.get("layers", "mean"))
        if axis in reduced or (axis != "heads" and narrow.top is not None):
            continue
        if axis == "layers" and (narrow.block == IMAGE_TO_IMAGE or narrow.queries_chosen):
            continue
        narrow = replace(narrow, reduce={**reduced, axis: "mean" if axis == "heads" else how})
        yield narrow
