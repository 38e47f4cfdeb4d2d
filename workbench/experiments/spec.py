"""What an experiment says, as one piece of data: its fields, what fits together, and its files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)

from workbench import zoo
from workbench.errors import InputError
from workbench.experiments.branching import Fork, acting_in, check_forks, every_fork, first_of
from workbench.experiments.change import MOST, Arguments
from workbench.experiments.changes import AnySpec
from workbench.experiments.conflicts import check_order
from workbench.experiments.noise import NoiseSpec
from workbench.experiments.sampler import SchedulerSpec

FORMAT = 2
"""The version of what an experiment is saved as."""

CARRIED = "# experiment: "
"""What begins the line of a script that holds its experiment as JSON."""

LARGEST = 8 << 20
"""Bytes that the file of an experiment may have."""

_SAID = 5
_MANY = 100
_LOCATED, _LONGEST = 120, 400
"""How many characters are said of where something does not fit, and of why."""


class ExperimentSpec(BaseModel):
    """Two prompts, the settings of both runs, and what is changed in the target's.

    Attributes:
        format: the version of this format.
        model: a zoo name, a folder or a Hub id.
        revision: of a Hub id.
        weights: the hash of the weights, see `Experiment.pinned`; None takes any.
        source_model: the model of the source, if it is another one of the same shape: a fine-tuned one, say.
            It is opened in the model's dtype and on its device, and keeps its own scheduler.
        source_weights: the hash of its weights; None takes any.
        source: the prompt whose run the activations come from; None where the model takes no prompt.
        target: the prompt whose run they go into; None likewise.
        seed: noise seed of both.
        source_seed: noise seed of the source, if it has its own; runs without words differ by it alone.
        num_inference_steps: steps of both; None is the pipeline's own default.
        guidance_scale: guidance of both; None is the pipeline's own default.
        scheduler: of both, by its class in diffusers and its configuration; None is the model's own.
        arguments: further pipeline arguments of both.
        picture: a file of a picture: both runs begin at the noise that it comes from, found with the source's
            prompt (see `workbench.invert`), so that the source's run is about that picture.
        source_from: the step at which the source leaves the target's run. 0 is a source with a run of its
            own; later, both are one run up to there, so that the images have one layout, and what is taken
            from the source acts from there on.
        interventions: what is changed in the target's run, in this order; none is the two plain runs.
        forks: branches that leave the changed run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    model: str = ""
    revision: str | None = None
    weights: str | None = Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$")
    source_model: str | None = None
    source_weights: str | None = Field(default=None, pattern=r"^sha256:[0-9a-f]{64}$")
    source: str | None = None
    target: str | None = None
    seed: int = 0
    source_seed: int | None = None
    num_inference_steps: int | None = Field(default=None, ge=1, le=100_000)
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    scheduler: SchedulerSpec | None = None
    arguments: Arguments = Field(default_factory=dict)
    picture: str | None = None
    source_from: int = Field(default=0, ge=0)
    interventions: Annotated[tuple[AnySpec, ...], Field(max_length=MOST, fail_fast=True)] = ()
    forks: Annotated[tuple[Fork, ...], Field(max_length=MOST, fail_fast=True)] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_any_format(cls, given: Any) -> Any:
        """Read what earlier versions wrote, and say so of what a later one did."""
        if not isinstance(given, dict):
            return given
        own = zoo.settings(str(given.get("model"))) if given.get("model") in zoo.models() else {}
        further = {name: given[name] for name in own if name in given and name not in cls.model_fields}
        if further:
            # What a model of the zoo is at its best with: wb.zoo.settings(…).
            given = {name: each for name, each in given.items() if name not in further}
            given["arguments"] = {**further, **(given.get("arguments") or {})}
        told = given.get("format", FORMAT)
        if isinstance(told, int) and told > FORMAT:
            raise ValueError(
                f"it is of format {told}, which a later version of the workbench wrote; this one reads up to "
                f"{FORMAT}"
            )
        if told == 1 and "interventions" not in given:
            renamed = {("interventions" if name == "patches" else name): each for name, each in given.items()}
            return {**renamed, "format": FORMAT}
        return given

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        check_order(self.interventions, self.num_inference_steps)
        check_forks(self.forks, self.interventions, self.num_inference_steps)
        return self

    @model_validator(mode="after")
    def _one_run(self) -> Self:
        if self.source_from and self.source_model is not None:
            raise ValueError("a source that leaves the target's run is of the same model; leave one out")
        if self.source_weights is not None and self.source_model is None:
            raise ValueError("source_weights are those of a source_model, and there is none")
        return self

    @model_validator(mode="after")
    def _leaves_in_time(self) -> Self:
        if self.num_inference_steps is not None and self.source_from >= self.num_inference_steps:
            raise ValueError(
                f"source_from={self.source_from}: the runs have {self.num_inference_steps} steps, counted "
                "from 0, so the source would never leave the target's run"
            )
        return self

    @model_validator(mode="after")
    def _both_prompts(self) -> Self:
        if (self.source is None) != (self.target is None):
            raise ValueError("source and target both have a prompt, or neither where the model takes none")
        return self

    @model_validator(mode="after")
    def _one_noise(self) -> Self:
        if self.source_from and self.source_seed not in (None, self.seed):
            raise ValueError(
                f"source_seed={self.source_seed}: a source that leaves the target's run at step "
                f"{self.source_from} has that run's noise; leave one of the two out"
            )
        return self

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.picture is not None and (self.source_seed is not None or self.source_model is not None):
            raise ValueError("with a picture both runs are of one noise and one model")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an experiment from a JSON file, or from a script or notebook that one was exported to.

        Raises:
            InputError: the file is no experiment; the message lists what is wrong with it.
        """
        try:
            if Path(path).stat().st_size > LARGEST:
                raise InputError(f"{path} is no experiment: it has more than {LARGEST >> 20} MiB.")
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no experiment: {error}") from error
        return cls.read(text, str(path))

    @classmethod
    def read(cls, text: str, name: str) -> Self:
        """Read an experiment from the text of such a file.

        Args:
            text: what is in it.
            name: the file's, which tells scripts (``.py``) and notebooks (``.ipynb``) from JSON.

        Raises:
            InputError: as `load`.
        """
        try:
            return cls.model_validate_json(_carried(text) if name.endswith((".py", ".ipynb")) else text)
        except ValidationError as error:
            raise InputError(f"{name} is no experiment: {wrong(error)}.") from None
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{name} is no experiment: {error}") from error

    def save(self, path: str | Path) -> Path:
        """Write the experiment to a JSON file."""
        written = Path(path)
        written.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return written

    def settings(self) -> dict[str, Any]:
        """Return the pipeline arguments that both runs share."""
        shared = {"num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale}
        return {**{name: value for name, value in shared.items() if value is not None}, **self.arguments}

    @property
    def labels(self) -> tuple[str, str]:
        """What tells the source from the target: their prompts, and their seeds where these differ."""
        seeds = self.seed if self.source_seed is None else self.source_seed, self.seed
        apart = seeds[0] != seeds[1]
        return (_label(self.source, seeds[0], apart), _label(self.target, seeds[1], apart))

    def plain(self) -> Self:
        """Return the two runs alone, without what is changed in further ones."""
        return self.model_copy(update={"interventions": (), "forks": ()})

    def fork(
        self,
        step: int,
        *,
        prompt: str | None = None,
        guidance_scale: float | None = None,
        noise: NoiseSpec | dict[str, Any] | None = None,
        interventions: Sequence[Any] = (),
        **arguments: JsonValue,
    ) -> Self:
        """Return the experiment with one branch more, that leaves its changed run.

        Args:
            step: the first step of the branch.
            prompt: its own, if it has one.
            guidance_scale: its own, likewise.
            noise: its own initial noise, likewise, as data; of step 0.
            interventions: further ones, as data.
            **arguments: others of the pipeline.

        Raises:
            InputError: the branch would only repeat the run, or does not fit it.
        """
        own = {"prompt": prompt, "guidance_scale": guidance_scale, "noise": noise, "arguments": arguments}
        try:
            fork = Fork(step=step, interventions=tuple(interventions), **own)  # type: ignore[arg-type]
            return type(self).model_validate(
                {**self.model_dump(), "forks": [*self.model_dump()["forks"], fork.model_dump()]}
            )
        except ValidationError as error:
            raise InputError(f"This is no branch of the experiment: {wrong(error)}.") from None

    def captures(self) -> tuple[str, ...]:
        """Return the sites the source's run must keep."""
        every = self.every_change()
        return tuple(dict.fromkeys(site for each in every for site in getattr(each, "captures", ())))

    def acting(self, steps: int) -> list[Any]:
        """Return the interventions as they act in runs of ``steps`` steps.

        Before ``source_from`` there is one run, and what is taken from it into itself changes nothing: those
        steps, and interventions of no other, are left out.

        Raises:
            InputError: one names a step that the runs have not.
        """
        return acting_in(self.interventions, steps, self.source_from)

    def first_step(self, steps: int) -> int:
        """Return the first of ``steps`` steps that anything is changed in; ``steps`` if nothing is."""
        return first_of(self.acting(steps), steps)

    def every_change(self) -> list[Any]:
        """Return the interventions of the run and of all branches."""
        return [
            *self.interventions,
            *(each for fork in every_fork(self.forks) for each in fork.interventions),
        ]


def _carried(text: str) -> str:
    """Return the experiment that a script or a notebook carries in a comment, as JSON."""
    if text.lstrip().startswith("{"):
        cells = json.loads(text).get("cells", ())
        text = "\n".join("".join(cell.get("source", ())) for cell in cells if isinstance(cell, dict))
    for line in text.splitlines():
        if line.startswith(CARRIED):
            return line.removeprefix(CARRIED)
    raise ValueError(f"no line of it begins with {CARRIED!r}, as in what was exported")


def wrong(error: ValidationError) -> str:
    """Say what does not fit, in one line."""
    if error.error_count() > _MANY:
        return f"{error.error_count()} things in it do not fit"
    found = error.errors(include_url=False, include_context=False)
    said = [
        f"{_cut('.'.join(map(str, each['loc'])), _LOCATED)}: {_cut(each['msg'], _LONGEST)}".lstrip(": ")
        for each in found[:_SAID]
    ]
    more = [f"and {len(found) - _SAID} more"] if len(found) > _SAID else []
    return "; ".join([*said, *more])


def _cut(text: str, most: int) -> str:
    """Return text of at most so many characters, its beginning and its end."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


def _label(prompt: str | None, seed: int, told: bool) -> str:
    words = [] if prompt is None else [prompt]
    return " · ".join([*words, f"seed {seed}"] if told or not words else words)
