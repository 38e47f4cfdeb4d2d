"""What a sweep measures of a run, beside its source and its target."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from workbench.errors import UnknownNameError, nearest
from workbench.experiments import measure
from workbench.experiments.measure import PICTURES
from workbench.experiments.metrics import difference, towards
from workbench.tracing.record import Record


@dataclass(frozen=True)
class RunMetric:
    """A number of a run, beside those of its source and its target.

    Attributes:
        name: what it is called in a sweep.
        of: called with the records of the run, the source and the target; returns a number. Or a metric of
            pictures, which `wb.metric` made.
        pictures: whether it looks at pictures; without, none need be decoded.

    Example:
        >>> [RunMetric(each, wb.metric("colour", wanted=each)) for each in ("red", "blue")]
    """

    name: str
    of: Callable[..., float]
    pictures: bool = True

    def __post_init__(self) -> None:
        """Take a metric of pictures as one of the runs that they are of."""
        if isinstance(self.of, measure.Metric):
            object.__setattr__(self, "of", _Pictured(self.of))

    @property
    def code(self) -> str | None:
        """What a script writes for it; None of a function of one's own."""
        if self is METRICS.get(self.name):
            return repr(self.name)
        if not isinstance(self.of, _Pictured) or self.of.metric.own is not None:
            return None
        own = self.of.metric
        given = [f"{name}={value!r}" for name, value in own.arguments.items()]
        made = f"wb.metric({', '.join([repr(own.name), *given])})"
        if self.name != own.name:
            return f"wb.RunMetric({self.name!r}, {made})"
        return made if given else repr(self.name)

    @property
    def pictured(self) -> tuple[str, tuple[str, ...]] | None:
        """The name of the metric of pictures that it is, as `wb.metric` knows it, and which it looks at.

        None of what is none, has further arguments or is a function of one's own.
        """
        if self is METRICS.get(self.name):
            return {"towards": ("towards", PICTURES), "difference": ("pixel", PICTURES[:1])}.get(self.name)
        if not isinstance(self.of, _Pictured) or self.of.metric.own is not None:
            return None
        own = self.of.metric
        return None if set(own.arguments) - {"to"} else (own.name, own.needs)

    @property
    def definition(self) -> str:
        """What it measures, as text: its code, or the source of a function and what that is given."""
        if self.code is not None:
            return self.code
        own, given = self.of.own if isinstance(self.of, _Pictured) else (self.of, {})
        try:
            text = inspect.getsource(own)
        except (OSError, TypeError):
            text = f"{getattr(own, '__module__', '')}.{getattr(own, '__qualname__', self.name)}"
        return f"{text}{given!r}" if given else text


def run_metric(named: str | RunMetric | measure.Metric | Callable[..., float]) -> RunMetric:
    """Return a metric of runs: by its name, one of pictures, or a function of the three records.

    Raises:
        UnknownNameError: no such metric.
    """
    if isinstance(named, RunMetric):
        return named
    if isinstance(named, str) and named not in METRICS and named in measure.names():
        named = measure.metric(named)
    if isinstance(named, measure.Metric):
        return RunMetric(named.name, _Pictured(named))
    if callable(named):
        return RunMetric(getattr(named, "__name__", type(named).__name__), named)
    if named not in METRICS:
        known = (*METRICS, *measure.names())
        raise UnknownNameError(f"No metric {named!r}.{nearest(str(named), known)} Or give a function.")
    return METRICS[named]


@dataclass(frozen=True)
class _Pictured:
    """A metric of pictures, taken of three records."""

    metric: measure.Metric

    @property
    def own(self) -> tuple[Callable[..., float], Mapping[str, Any]]:
        """The function that measures, and what else it is given."""
        return self.metric.own or self.metric.function, self.metric.arguments

    def __call__(self, run: Record, source: Record, target: Record) -> float:
        others = {"target": target, "source": source}
        return self.metric(run.images[0], **{name: others[name].images[0] for name in self.metric.needs})


def _latents(record: Record) -> torch.Tensor:
    latents = record.ticks[-1]["latents"]
    assert latents is not None
    return latents.double()


def _towards_latents(record: Record, source: Record, target: Record) -> float:
    start, way = _latents(target), _latents(source) - _latents(target)
    length = float((way**2).sum())
    return float(((_latents(record) - start) * way).sum()) / length if length else 0.0


def _difference_latents(record: Record, source: Record, target: Record) -> float:  # noqa: ARG001
    return float((_latents(record) - _latents(target)).abs().mean())


METRICS = {
    each.name: each
    for each in (
        RunMetric(
            "towards", lambda run, source, target: towards(run.images[0], target.images[0], source.images[0])
        ),
        RunMetric("difference", lambda run, _, target: difference(run.images[0], target.images[0])),
        RunMetric("towards_latents", _towards_latents, pictures=False),
        RunMetric("difference_latents", _difference_latents, pictures=False),
    )
}
"""By name: `towards` and `difference` of the pictures, and the same of the latents that the last step leaves,
which cost no decoding."""
