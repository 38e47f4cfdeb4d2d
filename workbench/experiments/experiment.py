"""`Experiment`: two prompts and what is put from one run into the other, as one piece of data."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from workbench import zoo
from workbench.errors import InputError, UnknownNameError
from workbench.interventions.patch import Patch
from workbench.models.asked import Captured
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record
from workbench.tracing.session import Listener
from workbench.tracing.sites import Site


class PatchSpec(BaseModel):
    """Which activations go from the source's run into the target's.

    Attributes:
        site: where.
        steps: which steps, each a number; None is every step.
        branch: which guidance branch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["patch"] = "patch"
    site: str
    steps: tuple[int, ...] | None = None
    branch: str = "all"

    @field_validator("site")
    @classmethod
    def _spelled(cls, site: str) -> str:
        try:
            return str(Site.parse(site))
        except UnknownNameError as error:
            # Only a ValueError is gathered with what else is wrong.
            raise ValueError(str(error)) from error

    @field_validator("steps")
    @classmethod
    def _some(cls, steps: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if steps is not None and not steps:
            raise ValueError("an empty choice of steps would do nothing; leave it out for every step")
        return steps


class Experiment(BaseModel):
    """Two prompts, the settings of both runs, and the patches between them.

    Attributes:
        format: the version of this format.
        model: a zoo name, a folder or a Hub id.
        source: the prompt whose run the activations come from; None where the model takes no prompt.
        target: the prompt whose run they go into; None likewise.
        seed: noise seed of both.
        source_seed: noise seed of the source, if it has its own; runs without words differ by it alone.
        num_inference_steps: steps of both; None is the pipeline's own default.
        guidance_scale: guidance of both; None is the pipeline's own default.
        arguments: further pipeline arguments of both.
        source_from: the step at which the source leaves the target's run. 0 is a source with a run of its
            own; later, both are one run up to there, so that the images have one layout, and patches act
            from there on.
        patches: what goes from one run into the other; none is the two plain runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str = ""
    source: str | None = None
    target: str | None = None
    seed: int = 0
    source_seed: int | None = None
    num_inference_steps: int | None = Field(default=None, ge=1)
    guidance_scale: float | None = Field(default=None, allow_inf_nan=False)
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    source_from: int = Field(default=0, ge=0)
    patches: tuple[PatchSpec, ...] = ()

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

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read an experiment from a JSON file.

        Raises:
            InputError: the file is no experiment; the message lists what is wrong with it.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is no experiment: {error}") from error

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

    def captures(self) -> tuple[str, ...]:
        """Return the sites the source's run must keep."""
        return tuple(dict.fromkeys(patch.site for patch in self.patches))

    def patched(self, source: Record) -> list[Patch]:
        """Return the patches, bound to the source's run."""
        return [
            Patch(patch.site, steps=patch.steps, branch=patch.branch, source=source)
            for patch in self.acting(source.ledger.steps)
        ]

    def acting(self, steps: int) -> list[PatchSpec]:
        """Return the patches as they act in runs of ``steps`` steps.

        Before ``source_from`` there is one run, and a patch from it into itself changes nothing: those steps,
        and patches of no other, are left out.
        """
        if not self.source_from:
            return list(self.patches)
        late = range(self.source_from, steps)
        found = []
        for patch in self.patches:
            for step in patch.steps or ():
                if not -steps <= step < steps:
                    raise InputError(f"The runs have {steps} steps, counted from 0; {step} is none of them.")
            chosen = late if patch.steps is None else [s for s in patch.steps if s % steps in late]
            if chosen:
                found.append(patch.model_copy(update={"steps": tuple(chosen)}))
        return found

    def first_step(self, steps: int) -> int:
        """Return the first of ``steps`` steps that any patch acts on; ``steps`` if none does."""
        firsts = [
            min(s % steps for s in patch.steps) if patch.steps is not None else 0
            for patch in self.acting(steps)
        ]
        return min(firsts, default=steps)

    def run(
        self,
        model: DiffusionModel | None = None,
        *,
        capture: tuple[Captured, ...] = (),
        listener: Listener | None = None,
    ) -> Outcome:
        """Run source, target and, if there are patches, the patched target.

        Args:
            model: an open model; None opens the one the experiment names.
            capture: further sites and probes to keep, in source and target.
            listener: told how the runs go on.
        """
        model = DiffusionModel(self.model) if model is None else model
        kept = (*self.captures(), *capture)
        target = self.run_target(model, capture=kept, listener=listener)
        source = self.run_source(model, target, capture=kept, listener=listener)
        return Outcome(self, source, target, self.patch(source, target, listener=listener))

    def run_target(
        self, model: DiffusionModel, *, capture: tuple[Captured, ...] = (), listener: Listener | None = None
    ) -> Record:
        """Run the target alone."""
        settings = {**self.settings(), "seed": self.seed, "listener": listener}
        return model.record(self.target, capture=capture, **settings)

    def run_source(
        self,
        model: DiffusionModel,
        target: Record,
        *,
        capture: tuple[Captured, ...] = (),
        listener: Listener | None = None,
    ) -> Record:
        """Run the source: from its noise, or from where it leaves the target's run.

        Raises:
            InputError: the target's run has no such step to leave it at.
        """
        if self.source_from:
            if self.source_from >= target.ledger.steps:
                raise InputError(
                    f"source_from={self.source_from}: the runs have {target.ledger.steps} steps, counted "
                    "from 0, so the source would never leave the target's run."
                )
            return target.fork(self.source_from, prompt=self.source, capture=capture, listener=listener)
        seed = self.seed if self.source_seed is None else self.source_seed
        settings = {**self.settings(), "seed": seed, "listener": listener}
        return model.record(self.source, capture=capture, **settings)

    def patch(self, source: Record, target: Record, *, listener: Listener | None = None) -> Record | None:
        """Return the patched run, computed only from the first patched step on; None without patches."""
        if not self.patches:
            return None
        return target.fork(
            self.first_step(target.ledger.steps),
            interventions=self.patched(source),
            capture=(),
            listener=listener,
        )


@dataclass(frozen=True)
class Outcome:
    """What an experiment's runs left behind; ``patched`` is None where nothing was patched."""

    experiment: Experiment
    source: Record
    target: Record
    patched: Record | None


def defaults(model: DiffusionModel) -> dict[str, Any]:
    """Return the steps and guidance a model is at its best with: the zoo's, or the pipeline's own.

    What it takes without a default is None.
    """
    if model.reference in zoo.models():
        return zoo.settings(model.reference)
    parameters = inspect.signature(model.pipeline).parameters
    names = ("num_inference_steps", "guidance_scale")
    own = {name: parameters[name].default for name in names if name in parameters}
    return {name: None if value is inspect.Parameter.empty else value for name, value in own.items()}


def _label(prompt: str | None, seed: int, told: bool) -> str:
    words = [] if prompt is None else [prompt]
    return " · ".join([*words, f"seed {seed}"] if told or not words else words)
