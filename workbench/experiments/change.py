"""What every intervention as data says: when, in which rows, how much, and where."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, ClassVar, Protocol, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from workbench.errors import InputError, UnknownNameError
from workbench.interventions.intervention import Intervention
from workbench.tracing.record import Record
from workbench.tracing.sites import Site

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Drawn = Annotated[int, Field(ge=0, lt=1 << 32)]
"""A seed."""


def _even(mask: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    if not mask or not mask[0] or len({len(row) for row in mask}) > 1:
        raise ValueError("a mask has rows, and all its rows are equally long")
    return mask


Picture = Annotated[
    tuple[Annotated[tuple[Share, ...], Field(max_length=1024, fail_fast=True)], ...],
    Field(max_length=1024, fail_fast=True),
    AfterValidator(_even),
]
Some = Annotated[tuple[int, ...], Field(min_length=1, max_length=10_000, fail_fast=True)]
Text = Annotated[str, Field(min_length=1, max_length=1000)]

OURS = {
    *("self", "step", "prompt", "seed", "generator", "latents", "capture", "interventions", "listener"),
    *("num_inference_steps", "guidance_scale", "output_type", "return_dict"),
}
"""What pipeline arguments of an experiment cannot be: fields of its own, or what a run is told besides."""

MOST = 1000
"""How many interventions, or branches, one run has at most."""


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

    def of(self, prompt: Any) -> Runs:
        """Return the same where another prompt than the target's is running, of which words are then."""

    def places(
        self, words: Sequence[str], *, source: bool = False, prompt: str | None = None
    ) -> Callable[[int], tuple[int, ...]]:
        """Return where words stand, once the length of the sequence is known.

        Args:
            words: of the running prompt, unless another is said.
            source: take the source's.
            prompt: take this one.
        """


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

    @property
    def place(self) -> tuple[str, ...]:
        """Where it leaves nothing of what was there before; nowhere, and so empty, where it does."""
        return ()

    @property
    def ground(self) -> tuple[str, ...]:
        """What it changes, whether or not something is left of what was there; empty if that is not known."""
        return self.place

    def choices(self, steps: int | None) -> tuple[Collection[Any] | None, ...]:
        """Return which of its place it chooses in each way, None being all.

        Args:
            steps: how many the runs have, if that is known: -1 is then the last.
        """
        chosen = self.steps
        if chosen is not None and steps is not None:
            chosen = tuple(step % steps for step in chosen)
        return (chosen, None if self.branch in ("all", "both") else (self.branch,), self.heads)


def _not_ours(arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
    if taken := sorted(OURS & set(arguments)):
        raise ValueError(f"{', '.join(taken)}: fields of the experiment, or what a run is told besides")
    return arguments


Arguments = Annotated[dict[str, JsonValue], AfterValidator(_not_ours)]
"""Arguments of the pipeline, but for those that an experiment has fields for."""


class SiteChange(Change):
    """A change of what passes a site.

    Attributes:
        site: where, spelled ``unet.mid_block`` or ``unet.mid_block:input``.
        tokens: which places of a sequence; None is every one.
        words: the same by words of the prompt that is running, wherever its text is the sequence.
    """

    site: Text
    tokens: Some | None = None
    words: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST, fail_fast=True)] | None = None

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

    @property
    def place(self) -> tuple[str, ...]:
        """The site, if nothing is left there."""
        return (self.site,) if self.overwrites else ()

    @property
    def ground(self) -> tuple[str, ...]:
        """The site."""
        return (self.site,)

    def choices(self, steps: int | None) -> tuple[Collection[Any] | None, ...]:
        """Return the choices of all changes, and of a sequence.

        Words and tokens are compared with their like alone: which token a word is, a tokenizer knows.
        """
        return (*super().choices(steps), self.tokens if self.words is None else self.words)


class LayerChange(Change):
    """A change of attention weights.

    Attributes:
        site: attention layers by path; ``*`` stands for anything.
    """

    site: str = Field(default="*", min_length=1)
    branch: str = Field(default="cond", min_length=1)
