"""The settings of the app: what its controls say as an experiment, and an experiment in its controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from traitlets import TraitError

from workbench.errors import InputError
from workbench.experiments.experiment import Experiment, defaults
from workbench.models import arguments as checks
from workbench.models.model import DiffusionModel
from workbench.widgets.controls import RunControls

SETTINGS = ("source", "target", "seed", "steps", "guidance", "source_from", "source_seed")
"""The controls that say what is run."""

_KEPT = {"picture", "revision", "scheduler", "source_model", "source_weights", "weights"}
"""What an experiment that was opened says and no control shows: further runs keep it."""


_SHOWN = {"num_inference_steps", "guidance_scale"}
"""A model's own settings that controls show; others are passed on as they are."""


class Settings:
    """What is asked for in the app's controls.

    Args:
        model: what runs.
        prompts: of source and target; None is an example, or no prompt where the model takes none.
        seeds: of the target and of the source; None of the source is the target's, and the next one where
            the model takes no prompt.
        steps: of both runs; None is the model's own default.
        guidance: of both runs; None likewise.
        source_from: the step at which the source leaves the target's run.
        arguments: further ones of the pipeline.

    Attributes:
        controls: where they are shown and changed.

    Raises:
        InputError: the model takes no such thing.
    """

    def __init__(
        self,
        model: DiffusionModel,
        *,
        prompts: tuple[str | None, str | None],
        seeds: tuple[int, int | None],
        steps: int | None,
        guidance: float | None,
        source_from: int,
        arguments: Mapping[str, Any],
    ) -> None:
        self._model = model
        further = {name: value for name, value in defaults(model).items() if name not in _SHOWN}
        self._arguments = {**further, **arguments}
        self._shown: Experiment | None = None
        self.controls = RunControls(
            **_about(model, *prompts), **_numbers(model, *seeds, steps, guidance), source_from=source_from
        )

    def asked(self) -> Experiment:
        """Return what the controls say, as an experiment without changes.

        Raises:
            InputError: it is none; the message names the field.
        """
        controls, shown = self.controls, self._shown
        kept = {} if shown is None else shown.model_dump(include=_KEPT)
        try:
            return Experiment(
                **kept,
                model=self._model.reference,
                source=controls.source if controls.can_prompt else None,
                target=controls.target if controls.can_prompt else None,
                seed=controls.seed,
                source_seed=controls.source_seed,
                num_inference_steps=controls.steps if controls.can_step else None,
                guidance_scale=controls.guidance if controls.can_guide else None,
                arguments=self._arguments if shown is None else shown.arguments,
                source_from=controls.source_from,
            )
        except ValidationError as error:
            first = error.errors()[0]
            field, why = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            what = f"{field} = {first.get('input')!r} cannot be used: {why}." if field else f"{why}."
            raise InputError(what) from error

    def show(self, experiment: Experiment) -> None:
        """Show an experiment's settings in the controls, all of them or none.

        Raises:
            InputError: one is beyond what the controls can show.
        """
        own = defaults(self._model)
        given = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
        wanted = {ours: getattr(experiment, name) or own.get(name) for ours, name in given.items()}
        if experiment.guidance_scale is not None:
            wanted["guidance"] = experiment.guidance_scale
        wanted |= {name: getattr(experiment, name) for name in ("source", "target", "seed", "source_from")}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        wanted["source_seed"] = experiment.source_seed
        before = {name: getattr(self.controls, name) for name in wanted}
        with self.controls.hold_sync():
            try:
                for name, value in wanted.items():
                    setattr(self.controls, name, value)
            except TraitError as error:
                for name, value in before.items():
                    setattr(self.controls, name, value)
                raise InputError(f"The app cannot show this experiment: {error}") from error

    def keep(self, experiment: Experiment) -> None:
        """Keep for further runs what no control shows of an experiment."""
        self._shown = experiment.plain()
        self.controls.scheduler = _sampler(self._model)


def _about(model: DiffusionModel, source: str | None, target: str | None) -> dict[str, Any]:
    """Return what the controls show of a model: its name, and the prompts if it takes any."""
    can_prompt = checks.takes(model.pipeline, "prompt")
    given = [prompt for prompt in (source, target) if prompt is not None]
    if given and not can_prompt:
        raise InputError(
            f"{_name(model)} takes no prompt, so {given[0]!r} means nothing to it. Compare two noises: "
            "Workbench(model, seed=0, source_seed=1)."
        )
    return {
        "model_name": model.reference or _name(model),
        "scheduler": _sampler(model),
        "source": ("a red circle" if source is None else source) if can_prompt else "",
        "target": ("a blue circle" if target is None else target) if can_prompt else "",
        "can_prompt": can_prompt,
    }


def _sampler(model: DiffusionModel) -> str:
    return ", ".join(type(each).__name__.removesuffix("Scheduler") for each in model.schedulers.values())


def _name(model: DiffusionModel) -> str:
    """Return the name of a pipeline's class, or of a loop's function."""
    return str(getattr(model.pipeline, "__name__", type(model.pipeline).__name__))


def _numbers(
    model: DiffusionModel, seed: int, source_seed: int | None, steps: int | None, guidance: float | None
) -> dict[str, Any]:
    """Return the numbers that the controls begin with, the model's own where none are given."""
    own = defaults(model)
    for ours, name, given in (
        ("steps", "num_inference_steps", steps),
        ("guidance", "guidance_scale", guidance),
    ):
        if given is not None and name not in own:
            raise InputError(f"{_name(model)} takes no {name}, so {ours}={given!r} would do nothing.")
    guidance = own.get("guidance_scale") if guidance is None else guidance
    apart = None if checks.takes(model.pipeline, "prompt") else seed + 1
    return {
        "seed": seed,
        "source_seed": apart if source_seed is None else source_seed,
        "steps": own.get("num_inference_steps") or 20 if steps is None else steps,
        "guidance": float(guidance or 0.0),
        "can_guide": "guidance_scale" in own,
        "can_step": "num_inference_steps" in own,
    }
