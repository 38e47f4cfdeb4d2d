"""Where the attention edits of an experiment act: seen in a run of it, and kept as numbers.

An edit is said in words and patterns of layers; a script that knows neither needs layers, keys and shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from workbench.attention.geometry import Scope, grid
from workbench.experiments.change import LayerChange, Runs
from workbench.experiments.changes import ForceMapSpec, ReweightSpec
from workbench.interventions.attention import AttentionEdit, Call


@dataclass(frozen=True)
class Place:
    """Where in a layer's call an edit acts.

    Attributes:
        image: from which query of its to which the image goes; None is from the first, or to the last.
        shape: the rows and columns that the image's queries form, where a map is forced.
        keys: of each word, where its keys are.
    """

    image: tuple[int | None, int | None]
    shape: tuple[int, int] | None
    keys: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Group:
    """Layers in which an edit acts alike: the paths, the denoiser's calls, and the place in each."""

    layers: tuple[str, ...]
    calls: tuple[int, ...]
    place: Place


class Survey(LayerChange):
    """Stands for an edit in a run that changes nothing, and sees where it would act.

    Attributes:
        edit: the edit.
        seen: what it would act on, by the denoiser's call and the layer.
    """

    kind: str = "survey"
    edit: LayerChange
    seen: dict[tuple[int, str], Place]

    @classmethod
    def of(cls, edit: LayerChange) -> Survey:
        """Return what stands for an edit."""
        shared = {name: getattr(edit, name) for name in LayerChange.model_fields if name != "kind"}
        return cls.model_construct(kind="survey", **shared, edit=edit, seen={})

    def bind(self, runs: Runs) -> AttentionEdit:
        """Return the edit that changes nothing."""
        return _Looking(site=self.site, **self.where(), survey=self, real=self.edit.bind(runs))

    def groups(self) -> list[Group]:
        """Return the layers and calls that are edited alike, in the order in which they came."""
        by_place: dict[tuple[str, Place], list[int]] = {}
        for (call, path), place in self.seen.items():
            by_place.setdefault((path, place), []).append(call)
        alike: dict[tuple[tuple[int, ...], Place], list[str]] = {}
        for (path, place), calls in by_place.items():
            alike.setdefault((tuple(sorted(calls)), place), []).append(path)
        return [Group(tuple(paths), calls, place) for (calls, place), paths in alike.items()]


@dataclass(frozen=True)
class _Looking(AttentionEdit):
    """Acts where an edit acts, and leaves everything as it is."""

    survey: Survey = field(kw_only=True, repr=False, compare=False)
    real: Any = field(kw_only=True, repr=False, compare=False)

    def fits(self, scope: Scope) -> bool:
        return bool(self.real.fits(scope))

    def attend(self, call: Call) -> torch.Tensor:
        edit, query = self.survey.edit, call.handed["query"]
        image, shape = call.scope.span("image", query.shape[2]), None
        words: tuple[str, ...] = ()
        sample = next(sample for _, sample in call.samples(self))
        if isinstance(edit, ForceMapSpec):
            words, shape = (edit.word,), grid(image.stop - image.start, *call.watch.aspect)
        elif isinstance(edit, ReweightSpec):
            words = tuple(edit.words)
        keys = tuple(tuple(call.columns(word, sample).tolist()) for word in words)
        span = (image.start, image.stop) if call.scope.mixed else (None, None)
        self.survey.seen[(call.row.call, call.scope.path)] = Place(span, shape, keys)
        return call.kernel()
