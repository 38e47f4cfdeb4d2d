"""`Metric`: a number of a run's picture, by name, so that code and JSON ask for it alike."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.experiments import learned, metrics

PICTURES = ("target", "source")
"""What a picture can be compared with: those of the runs it is made of."""

ALONE: dict[str, Callable[..., float]] = {
    "clip_score": learned.clip_score,
    "colour": metrics.colour,
    "shape": metrics.shape,
}
"""Metrics of one picture."""

COMPARING: dict[str, Callable[..., float]] = {
    "dino": learned.dino,
    "lpips": learned.lpips,
    "mask_iou": metrics.mask_iou,
    "pixel": metrics.difference,
    "psnr": metrics.psnr,
    "ssim": metrics.ssim,
}
"""Metrics of a picture and another, which ``to`` names: the target's, or the source's."""

BETWEEN: dict[str, Callable[..., float]] = {"towards": metrics.towards}
"""Metrics of a picture, the target's and the source's."""


@dataclass(frozen=True)
class Metric:
    """A number of a picture; made by `metric`.

    Attributes:
        name: its name.
        arguments: what else it was given, as data.
        needs: which other pictures it looks at, ``"target"`` or ``"source"``.
        own: the user's function that it is, if it is one.
    """

    name: str
    arguments: Mapping[str, Any]
    needs: tuple[str, ...]
    function: Callable[..., float] = field(repr=False, compare=False)
    own: Callable[..., float] | None = field(default=None, repr=False)

    def __call__(
        self,
        image: Image.Image,
        *,
        target: Image.Image | None = None,
        source: Image.Image | None = None,
    ) -> float:
        """Measure a picture.

        Args:
            image: the picture.
            target: that of the run without a patch, or whatever else it is compared with.
            source: that of the run the patch comes from.

        Raises:
            InputError: a picture it needs was not given.
        """
        given = {"target": target, "source": source}
        for each in self.needs:
            if given[each] is None:
                raise InputError(
                    f"{self.name} looks at the {each}'s picture too, and none was given: "
                    f"metric(image, {each}=…)."
                )
        return float(self.function(image, *(given[each] for each in self.needs)))

    def as_data(self) -> dict[str, Any]:
        """Return the metric as data: ``metric(data["name"], **data["arguments"])`` makes it again.

        Raises:
            InputError: it is a function of the user's own.
        """
        if self.own is not None:
            raise InputError(
                f"{self.name} is a function of your own, which is no data. With a name there are: "
                f"{', '.join(names())}."
            )
        return {"name": self.name, "arguments": dict(self.arguments)}


def metric(which: str | Callable[..., float], **arguments: Any) -> Metric:
    """Return a metric, to be called with a picture: ``metric("psnr")(image, target=other)``.

    Args:
        which: a name (``"pixel"``, ``"psnr"``, ``"ssim"``, ``"lpips"``, ``"clip_score"``, ``"dino"``,
            ``"mask_iou"``, ``"colour"``, ``"shape"``, ``"towards"``), or a function of a picture, which may
            take the pictures ``target`` and ``source`` too.
        **arguments: its own: ``text`` and ``model`` of ``"clip_score"``, ``model`` of ``"dino"``, ``wanted``
            of ``"colour"``. One that compares takes ``to``, with whose picture: the ``"target"``'s, which it
            is where nothing is said, or the ``"source"``'s.

    Raises:
        UnknownNameError: no such metric.
        InputError: an argument it does not take, or one that is missing.
    """
    if callable(which):
        taken = inspect.signature(which).parameters
        needs = tuple(each for each in PICTURES if each in taken)
        named = partial(_by_name, partial(which, **arguments), needs)
        return Metric(getattr(which, "__name__", repr(which)), arguments, needs, named, which)
    if which not in names():
        raise UnknownNameError(f"No metric {which!r}.{nearest(str(which), names())}")
    given, needs = dict(arguments), ()
    if which in COMPARING:
        to = given.pop("to", PICTURES[0])
        if to not in PICTURES:
            raise InputError(f"to={to!r}: {which} compares with the 'target' or the 'source'.")
        needs = (to,)
    elif which in BETWEEN:
        needs = PICTURES
    function = (ALONE | COMPARING | BETWEEN)[which]
    _check_arguments(which, function, len(needs) + 1, given)
    return Metric(which, arguments, needs, partial(function, **given))


def names() -> tuple[str, ...]:
    """Return the names of the metrics."""
    return tuple(sorted((*ALONE, *COMPARING, *BETWEEN)))


def arguments_of(name: str) -> tuple[str, ...]:
    """Return what a metric takes beside pictures, in its order.

    Raises:
        UnknownNameError: no such metric.
    """
    if name not in names():
        raise UnknownNameError(f"No metric {name!r}.{nearest(name, names())}")
    pictures = 1 if name in ALONE else 2 if name in COMPARING else 3
    own = [each.name for each in _own_parameters((ALONE | COMPARING | BETWEEN)[name], pictures)]
    return (*own, *(["to"] if name in COMPARING else []))


def _own_parameters(function: Callable[..., float], pictures: int) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())[pictures:]


def _by_name(function: Callable[..., float], needs: tuple[str, ...], image: Any, *others: Any) -> float:
    return function(image, **dict(zip(needs, others, strict=True)))


def _check_arguments(
    name: str, function: Callable[..., float], pictures: int, given: Mapping[str, Any]
) -> None:
    own = _own_parameters(function, pictures)
    needed = [each.name for each in own if each.default is inspect.Parameter.empty]
    if set(given) - {each.name for each in own} or set(needed) - set(given):
        takes = ", ".join(f"{each}=…" for each in arguments_of(name)) or "nothing else"
        raise InputError(f"metric({name!r}) takes {takes}, and was given {', '.join(given) or 'nothing'}.")
