"""Interventions as data: what an experiment changes in its target's run, as JSON says it.

Each becomes an intervention of `workbench.interventions` once the runs it needs are there. They act in the
order they are listed in; of two that put something new in the same place the later would undo the earlier,
so that is an error.
"""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from workbench.errors import InputError, UnknownNameError
from workbench.interventions.attach import Attach
from workbench.interventions.attention import ForceMap, InjectAttention, Reweight
from workbench.interventions.corrupt import Corrupt
from workbench.interventions.feature import Feature
from workbench.interventions.intervention import Intervention
from workbench.interventions.patch import Patch
from workbench.interventions.scale import Ablate, Scale
from workbench.interventions.steer import Steer
from workbench.tracing.record import Record
from workbench.tracing.sites import Site

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Picture = tuple[tuple[Share, ...], ...]
Some = Annotated[tuple[int, ...], Field(min_length=1)]


class Runs(Protocol):
    """The runs of an experiment, as far as an intervention needs them.

    Attributes:
        source: the run that is taken from.
        allow_code: whether modules of the user's own may be imported.
    """

    source: Record
    allow_code: bool

    def plain(self, prompt: str | None, sites: Sequence[str]) -> Record:
        """Return a run of another prompt with the target's seed, which keeps ``sites``."""

    def places(self, words: Sequence[str], *, source: bool = False) -> Callable[[int], tuple[int, ...]]:
        """Return where words of a prompt stand, once the length of the sequence is known."""


class Change(BaseModel):
    """What every change of a run says.

    Attributes:
        steps: which steps, each a number; None is every step. Negative ones count from the end.
        branch: which guidance branch.
        heads: which heads of an attention layer; None is every one.
        mask: how much of it each place of the picture gets, rows of numbers from 0 to 1, at any size.
        strength: how much of it is made; 1 is all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    overwrites: ClassVar[bool] = False
    """Whether nothing is left of what was there before."""

    kind: str
    steps: Some | None = None
    branch: str = Field(default="all", min_length=1)
    heads: Some | None = None
    mask: Picture | None = None
    strength: Finite = 1.0

    @field_validator("mask")
    @classmethod
    def _even(cls, mask: Picture | None) -> Picture | None:
        if mask is not None and (not mask or not mask[0] or len({len(row) for row in mask}) > 1):
            raise ValueError("a mask has rows, and all its rows are equally long")
        return mask

    @abstractmethod
    def bind(self, runs: Runs) -> Intervention:
        """Return the intervention, with the runs it needs."""

    @property
    def captures(self) -> tuple[str, ...]:
        """The sites that the source's run must keep."""
        return ()

    @property
    def everywhere(self) -> bool:
        """Whether it acts on whole values."""
        return self.mask is None and self.strength == 1

    def act(self, steps: int) -> set[int]:
        """Return the steps, of so many, in which it acts."""
        for step in self.steps or ():
            if not -steps <= step < steps:
                raise InputError(f"The runs have {steps} steps, counted from 0; {step} is none of them.")
        return set(range(steps)) if self.steps is None else {step % steps for step in self.steps}

    def within(self, start: int, end: int, steps: int) -> tuple[int, ...]:
        """Return the steps, of so many, in which it acts from one up to another."""
        return tuple(sorted(step for step in self.act(steps) if start <= step < end))

    def where(self) -> dict[str, Any]:
        """Return what it has in common with every intervention, as those take it."""
        found = {"steps": self.steps, "branch": self.branch, "heads": self.heads, "strength": self.strength}
        return {**found, "mask": None if self.mask is None else torch.tensor(self.mask)}

    def _clashes(self, other: Change) -> bool:  # noqa: ARG002
        return False


class SiteChange(Change):
    """A change of what passes a site.

    Attributes:
        site: where, spelled ``unet.mid_block`` or ``unet.mid_block:input``.
        tokens: which places of a sequence; None is every one.
        words: the same by words of the target's prompt, wherever its text is the sequence.
    """

    site: str
    tokens: Some | None = None
    words: tuple[str, ...] | None = None

    @field_validator("site")
    @classmethod
    def _spelled(cls, site: str) -> str:
        try:
            return str(Site.parse(site))
        except UnknownNameError as error:
            # Only a ValueError is gathered with what else is wrong.
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.tokens is not None and self.words is not None:
            raise ValueError("tokens and words both choose places; leave one of them out")
        return self

    def at(self, runs: Runs) -> dict[str, Any]:
        """Return where it acts, as interventions at sites take it."""
        tokens = self.tokens if self.words is None else runs.places(self.words)
        return {"site": self.site, **self.where(), "tokens": tokens}

    def _clashes(self, other: Change) -> bool:
        if not (isinstance(other, SiteChange) and self.overwrites and other.overwrites):
            return False
        if self.site != other.site or not (self.everywhere and other.everywhere):
            return False
        chosen = [(one, two) for one, two in zip(_choices(self), _choices(other), strict=True)]
        return all(one is None or two is None or set(one) & set(two) for one, two in chosen)


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
    references: tuple[str, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _has_references(self) -> Self:
        if (self.how in ("mean", "resample")) != bool(self.references):
            raise ValueError("'mean' and 'resample' take references, prompts, and the other ways none")
        return self

    def bind(self, runs: Runs) -> Ablate:
        """Return the ablation, with runs of its references."""
        references = [runs.plain(prompt, [self.site]) for prompt in self.references]
        return Ablate(**self.at(runs), how=self.how, references=references, seed=self.seed)


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
    site: str = Corrupt.site
    branch: str = Field(default=Corrupt.branch, min_length=1)
    strength: Finite = Corrupt.strength
    seed: int = 0

    @classmethod
    def of(cls, corrupt: Corrupt, steps: int) -> Self:
        """Return an intervention as data.

        Args:
            corrupt: the intervention.
            steps: how many a run has.

        Raises:
            InputError: it acts on some samples of several, or on places that a function finds.
        """
        if corrupt.samples is not None or callable(corrupt.tokens):
            raise InputError(
                f"{corrupt} is no data: that has neither samples nor a function for tokens. Give numbers."
            )
        chosen, mask = corrupt.steps, corrupt.mask
        names = ("site", "branch", "heads", "tokens", "strength", "seed")
        return cls(
            **{name: getattr(corrupt, name) for name in names},
            steps=tuple(range(steps)[chosen]) if isinstance(chosen, slice) else chosen,  # type: ignore[arg-type]
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
        direction: one's own in their place, nested rows of numbers (or a tensor, kept in float32): of one
            sample, the value's shape without its rows, or what broadcasts to that.
    """

    kind: Literal["steer"] = "steer"
    pairs: tuple[tuple[str, str], ...] = ()
    method: Literal["mean", "pca"] = "mean"
    direction: tuple[Any, ...] | None = None

    @field_validator("direction", mode="before")
    @classmethod
    def _numbers(cls, direction: Any) -> tuple[Any, ...] | None:
        if direction is None:
            return None
        try:
            given = torch.as_tensor(direction, dtype=torch.float32).detach()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"a direction is rows of numbers, all of a depth equally long: {error}"
            ) from error
        if not given.ndim or not given.numel() or not torch.isfinite(given).all():
            raise ValueError("a direction has at least one number, and all of them are finite")
        found: tuple[Any, ...] = _tuples(given.tolist())
        return found

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
        at = self.at(runs)
        return Steer.between(at.pop("site"), *sides, method=self.method, **at)


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


class LayerChange(Change):
    """A change of attention weights.

    Attributes:
        site: attention layers by path; ``*`` stands for anything.
    """

    site: str = Field(default="*", min_length=1)
    branch: str = Field(default="cond", min_length=1)


class ReweightSpec(LayerChange):
    """Words given more or less of the attention.

    Attributes:
        words: by what, by word of the target's prompt.
    """

    kind: Literal["reweight"] = "reweight"
    words: Annotated[dict[str, Finite], Field(min_length=1)]

    def bind(self, runs: Runs) -> Reweight:  # noqa: ARG002
        """Return the edit."""
        return Reweight(site=self.site, **self.where(), words=self.words)


class InjectSpec(LayerChange):
    """The source's attention weights put in place of the target's.

    Attributes:
        site: one attention layer by path: its queries and keys are kept of the source's run.
        block: ``"image->text"`` or ``"image->image"``.
    """

    kind: Literal["inject"] = "inject"
    site: Annotated[str, Field(pattern=r"^[\w.]+$")]
    block: Literal["image->text", "image->image"] = "image->text"

    @property
    def captures(self) -> tuple[str, ...]:
        """The queries and keys of the layer."""
        return (f"{self.site}:query", f"{self.site}:key")

    def bind(self, runs: Runs) -> InjectAttention:
        """Return the edit from the source's run."""
        return InjectAttention(site=self.site, **self.where(), source=runs.source, block=self.block)


class ForceMapSpec(LayerChange):
    """Where the image attends to a word, said.

    Attributes:
        word: of the target's prompt.
        map: rows of weights from 0 to 1, of the whole picture, at any size.
    """

    kind: Literal["force_map"] = "force_map"
    word: Annotated[str, Field(min_length=1)]
    map: Picture

    _rows = field_validator("map")(Change._even.__func__)  # type: ignore[attr-defined]

    def bind(self, runs: Runs) -> ForceMap:  # noqa: ARG002
        """Return the edit."""
        return ForceMap(site=self.site, **self.where(), word=self.word, map=torch.tensor(self.map))


class TurnSpec(BaseModel):
    """From a step on, another prompt, another guidance or other arguments of the pipeline.

    Attributes:
        step: the first step that has them.
        prompt: the other prompt.
        guidance_scale: the other guidance.
        arguments: others of the pipeline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["turn"] = "turn"
    step: Annotated[int, Field(ge=0)]
    prompt: str | None = None
    guidance_scale: Finite | None = None
    arguments: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.changes():
            raise ValueError(f"a {self.kind} changes something: prompt, guidance_scale or arguments")
        return self

    def changes(self) -> dict[str, Any]:
        """Return what a fork at the step is told."""
        said = {"prompt": self.prompt, "guidance_scale": self.guidance_scale}
        return {**{name: value for name, value in said.items() if value is not None}, **self.arguments}


AnySpec = Annotated[
    PatchSpec
    | AblateSpec
    | ScaleSpec
    | CorruptSpec
    | SteerSpec
    | ModuleSpec
    | ReweightSpec
    | InjectSpec
    | ForceMapSpec
    | TurnSpec,
    Field(discriminator="kind"),
]


def check_order(changes: Sequence[Any]) -> None:
    """Refuse changes of which one would undo another.

    Raises:
        ValueError: with both.
    """
    for (first, one), (second, two) in combinations(enumerate(changes), 2):
        if isinstance(one, Change) and isinstance(two, Change) and one._clashes(two):
            raise ValueError(
                f"{two.kind} (number {second}) puts something new where {one.kind} (number {first}) just "
                "did: give them other steps, branches, heads or tokens, or a strength"
            )
        if isinstance(one, TurnSpec) and isinstance(two, TurnSpec) and two.step <= one.step:
            raise ValueError(
                f"turns go forward: number {second}, at step {two.step}, comes after that at step {one.step}"
            )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _choices(change: SiteChange) -> tuple[Any, ...]:
    branch = None if change.branch in ("all", "both") else (change.branch,)
    # Words and tokens are compared with their like alone: which token a word is, a tokenizer knows.
    return (change.steps, branch, change.heads, change.tokens, change.words)


def by_kind() -> Mapping[str, type[BaseModel]]:
    """Return each kind of intervention as data, by its name in JSON."""
    kinds = AnySpec.__origin__.__args__  # type: ignore[attr-defined]
    return {kind.model_fields["kind"].default: kind for kind in kinds}
