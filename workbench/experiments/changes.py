"""Interventions as data: what an experiment changes in its target's run, as JSON says it.

Each becomes an intervention of `workbench.interventions` once the runs it needs are there. They act in the
order they are listed in; one that leaves nothing of an earlier is an error, see
`workbench.experiments.conflicts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from workbench.errors import InputError
from workbench.experiments.change import (
    Arguments,
    Finite,
    LayerChange,
    Picture,
    Runs,
)
from workbench.experiments.noise import NoiseSpec
from workbench.experiments.site_changes import (
    AblateSpec,
    CorruptSpec,
    ModuleSpec,
    PatchSpec,
    ReplaceSpec,
    ScaleSpec,
    SteerSpec,
)
from workbench.interventions.attention import ForceMap, InjectAttention, Reweight


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
    def place(self) -> tuple[str, ...]:
        """The layer's weights of this block."""
        return (self.site, self.block)

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

    @property
    def place(self) -> tuple[str, ...]:
        """The layers' weights of the word."""
        return (self.site, self.word)

    def bind(self, runs: Runs) -> ForceMap:  # noqa: ARG002
        """Return the edit."""
        return ForceMap(site=self.site, **self.where(), word=self.word, map=torch.tensor(self.map))


class TurnSpec(BaseModel):
    """From a step on, another prompt, another guidance or other arguments; from step 0, other initial noise.

    Attributes:
        step: the first step that has them.
        prompt: the other prompt.
        guidance_scale: the other guidance.
        noise: what the run begins at instead of its own noise; of step 0 alone.
        arguments: others of the pipeline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["turn"] = "turn"
    step: Annotated[int, Field(ge=0)]
    prompt: str | None = None
    guidance_scale: Finite | None = None
    noise: NoiseSpec | None = None
    arguments: Arguments = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.changes():
            raise ValueError(f"a {self.kind} changes something: prompt, guidance_scale, noise or arguments")
        return self

    @model_validator(mode="after")
    def _begins(self) -> Self:
        if self.noise is not None and self.step:
            raise ValueError(
                f"initial noise is what step 0 begins at, and this {self.kind} is at step {self.step}"
            )
        return self

    def check(self, steps: int) -> None:
        """Refuse to be at a step that runs of so many have not.

        Raises:
            InputError: with both.
        """
        if self.step >= steps:
            raise InputError(
                f"The runs have {steps} steps, counted from 0; a {self.kind} at {self.step} is in none."
            )

    def changes(self) -> dict[str, Any]:
        """Return what a fork at the step is told; of ``latents`` what is said, see `NoiseSpec.latents`."""
        said = {"prompt": self.prompt, "guidance_scale": self.guidance_scale, "latents": self.noise}
        return {**{name: value for name, value in said.items() if value is not None}, **self.arguments}


AnySpec = Annotated[
    PatchSpec
    | AblateSpec
    | ReplaceSpec
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


def by_kind() -> Mapping[str, type[BaseModel]]:
    """Return each kind of intervention as data, by its name in JSON."""
    kinds = AnySpec.__origin__.__args__  # type: ignore[attr-defined]
    return {kind.model_fields["kind"].default: kind for kind in kinds}
