"""Interventions as data that change what passes a site."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, JsonValue, model_validator

from workbench.errors import InputError
from workbench.experiments.change import MOST, Drawn, Finite, Runs, SiteChange, Some, Text
from workbench.interventions.attach import Attach
from workbench.interventions.corrupt import Corrupt
from workbench.interventions.feature import Feature
from workbench.interventions.patch import Patch
from workbench.interventions.replace import Replace
from workbench.interventions.scale import Ablate, Scale
from workbench.interventions.steer import Steer
from workbench.tracing.structure import describe

_MANY, _DEEPEST = 1 << 18, 8
"""How many numbers an experiment gives at once at most, and in how many axes."""


def _numbers(given: Any) -> tuple[Any, ...]:
    """Return nested rows of numbers as tuples, each as float32 has it."""
    try:
        tensor = torch.as_tensor(given, dtype=torch.float32).detach()
        fits = 0 < tensor.ndim <= _DEEPEST and 0 < tensor.numel() <= _MANY
        right = fits and bool(torch.isfinite(tensor).all())
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"these are no rows of numbers, all of a depth equally long: {error}") from error
    if not right:
        raise ValueError(
            f"from one to {_MANY} finite numbers can be given, in rows of at most {_DEEPEST} axes; this is "
            f"{describe(tensor)}"
        )
    found: tuple[Any, ...] = _tuples(tensor.tolist())
    return found


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


Numbers = Annotated[tuple[Any, ...], BeforeValidator(_numbers)]
"""Numbers in nested rows; of a tensor they are taken."""


class PatchSpec(SiteChange):
    """An activation of the source's run put in place of the target's.

    Attributes:
        from_site: where in the source it comes from; None is the same place.
        from_step: the one step of the source it comes from; None is the same step.
        from_tokens: which places of the source's sequence go into ``tokens``; None is the same ones.
        from_words: the same by words of the source's prompt; None is the same words.
    """

    overwrites: ClassVar[bool] = True

    kind: Literal["patch"] = "patch"
    from_site: str | None = None
    from_step: int | None = None
    from_tokens: Some | None = None
    from_words: tuple[str, ...] | None = None

    @property
    def captures(self) -> tuple[str, ...]:
        """The site that the source's run must keep."""
        return (self.site if self.from_site is None else self.from_site,)

    def bind(self, runs: Runs) -> Patch:
        """Return the patch from the source's run."""
        words = self.words if self.from_words is None else self.from_words
        tokens: Any = self.from_tokens if words is None else runs.places(words, source=True)
        origin = {"from_site": self.from_site, "from_step": self.from_step, "from_tokens": tokens}
        return Patch(**self.at(runs), **origin, source=runs.source)


class AblateSpec(SiteChange):
    """An activation taken away, see `workbench.interventions.scale.Ablate`.

    Attributes:
        how: ``"zero"``, ``"mean"``, ``"resample"`` or ``"noise"``.
        references: prompts whose runs are the mean, or are drawn from.
        seed: of what is drawn.
    """

    overwrites: ClassVar[bool] = True

    kind: Literal["ablate"] = "ablate"
    how: Literal["zero", "mean", "resample", "noise"] = "zero"
    references: Annotated[tuple[str, ...], Field(max_length=MOST, fail_fast=True)] = ()
    seed: Drawn = 0

    @model_validator(mode="after")
    def _has_references(self) -> Self:
        if (self.how in ("mean", "resample")) != bool(self.references):
            raise ValueError("'mean' and 'resample' take references, prompts, and the other ways none")
        return self

    def bind(self, runs: Runs) -> Ablate:
        """Return the ablation, with runs of its references."""
        references = [runs.plain(prompt, [self.site]) for prompt in self.references]
        words, at = self.words, self.at(runs)
        own = () if words is None else tuple(runs.places(words, prompt=each) for each in self.references)
        return Ablate(**at, how=self.how, references=references, reference_tokens=own, seed=self.seed)


class ReplaceSpec(SiteChange):
    """A value of one's own in place of an activation, see `workbench.interventions.replace.Replace`.

    Attributes:
        value: nested rows of numbers (or a tensor, kept in float32): of one sample, the activation's shape
            without its rows, or what broadcasts to that.
    """

    overwrites: ClassVar[bool] = True

    kind: Literal["replace"] = "replace"
    value: Numbers

    def bind(self, runs: Runs) -> Replace:
        """Return the intervention."""
        return Replace(**self.at(runs), value=torch.tensor(self.value))


class ScaleSpec(SiteChange):
    """An activation multiplied.

    Attributes:
        factor: by what.
    """

    kind: Literal["scale"] = "scale"
    factor: Finite

    def bind(self, runs: Runs) -> Scale:
        """Return the scaling."""
        return Scale(**self.at(runs), factor=self.factor)


class CorruptSpec(SiteChange):
    """Noise added to an activation, the same in every call, see `workbench.interventions.corrupt.Corrupt`.

    Attributes:
        site: by default the embedded prompt, as a UNet is handed it.
        branch: by default the one with the prompt.
        strength: how large it is, in standard deviations of what is changed.
        seed: of the noise.
    """

    kind: Literal["corrupt"] = "corrupt"
    site: Text = Corrupt.site
    branch: str = Field(default=Corrupt.branch, min_length=1)
    strength: Finite = Corrupt.strength
    seed: Drawn = 0

    @classmethod
    def of(cls, corrupt: Corrupt, steps: int) -> Self:
        """Return an intervention as data.

        Args:
            corrupt: the intervention.
            steps: how many a run has.

        Raises:
            InputError: it acts on some samples of several, on places that a function finds, or in no step.
        """
        if corrupt.samples is not None or callable(corrupt.tokens):
            raise InputError(
                f"{corrupt} is no data: that has neither samples nor a function for tokens. Give numbers."
            )
        steps_of, mask = corrupt.steps, corrupt.mask
        chosen = tuple(range(steps)[steps_of]) if isinstance(steps_of, slice) else steps_of
        if chosen == ():
            raise InputError(f"{corrupt} acts in none of the {steps} steps.")
        names = ("site", "branch", "heads", "tokens", "strength", "seed")
        return cls(
            **{name: getattr(corrupt, name) for name in names},
            steps=chosen,  # type: ignore[arg-type]
            mask=None if mask is None else _tuples(mask.tolist()),
        )

    def bind(self, runs: Runs) -> Corrupt:
        """Return the intervention."""
        return Corrupt(**self.at(runs), seed=self.seed)


class SteerSpec(SiteChange):
    """An activation moved along a direction: the one between prompts, or one that is given.

    Attributes:
        pairs: of prompts, (towards, away); runs of them with the target's seed give the direction.
        method: ``"mean"`` of the differences, or their first component, ``"pca"``.
        direction: one's own in their place, as the value of `ReplaceSpec`.
    """

    kind: Literal["steer"] = "steer"
    pairs: Annotated[tuple[tuple[str, str], ...], Field(max_length=MOST, fail_fast=True)] = ()
    method: Literal["mean", "pca"] = "mean"
    direction: Numbers | None = None

    @model_validator(mode="after")
    def _one_direction(self) -> Self:
        if bool(self.pairs) == (self.direction is not None):
            raise ValueError("steering takes pairs of prompts or a direction of one's own, one of the two")
        return self

    def bind(self, runs: Runs) -> Steer:
        """Return the steering, its direction found in runs of the pairs if it is not given."""
        if self.direction is not None:
            return Steer(**self.at(runs), direction=torch.tensor(self.direction))
        kept = [self.site]
        sides = [[runs.plain(pair[side], kept) for pair in self.pairs] for side in (0, 1)]
        at, words = self.at(runs), self.words
        seen = (
            []
            if words is None
            else [tuple(runs.places(words, prompt=p) for p in pair) for pair in self.pairs]
        )
        return Steer.between(at.pop("site"), *sides, method=self.method, seen=seen, **at)  # type: ignore[arg-type]


class ModuleSpec(SiteChange):
    """A module of one's own at a site: what it makes of the activation goes on.

    Attributes:
        module: where it is, ``"package.module:name"``; a class or a function is called for it with the
            arguments, anything else that can be called is taken as it is.
        arguments: of that call; None is no call.
        feature: of a sparse autoencoder (with ``encode`` and ``decode``), which feature is changed.
        to: what a feature is clamped to.
        times: what a feature is multiplied by.
    """

    kind: Literal["module"] = "module"
    module: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    arguments: dict[str, JsonValue] | None = None
    feature: Annotated[int, Field(ge=0)] | None = None
    to: Finite | None = None
    times: Finite | None = None

    @model_validator(mode="after")
    def _one_change(self) -> Self:
        if (self.feature is None) != (self.to is None and self.times is None):
            raise ValueError("a feature is changed to or times something; without one there is neither")
        if self.to is not None and self.times is not None:
            raise ValueError("a feature goes either to or times something")
        return self

    def check_trusted(self, allow_code: bool) -> None:
        """Refuse to import it where nobody said that it may be.

        Raises:
            InputError: with what it would import.
        """
        if not allow_code:
            raise InputError(
                f"The experiment wants to import {self.module!r}, which may run anything. If you trust it: "
                "allow_code=True."
            )

    def bind(self, runs: Runs) -> Attach | Feature:
        """Return the module at its site.

        Raises:
            InputError: it cannot be imported, or nobody said that it may be.
        """
        self.check_trusted(runs.allow_code)
        home, _, name = self.module.partition(":")
        try:
            found: Any = getattr(importlib.import_module(home), name)
        except (ImportError, AttributeError) as error:
            raise InputError(f"module={self.module!r} cannot be imported: {error}") from error
        made = found if self.arguments is None else found(**self.arguments)
        if self.feature is None:
            return Attach(**self.at(runs), module=made)
        return Feature(**self.at(runs), sae=made, feature=self.feature, to=self.to, times=self.times)
