"""The scheduler of an experiment as data: put on a model for its runs, and taken off again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import diffusers
from diffusers import DiffusionPipeline, SchedulerMixin
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from workbench import zoo
from workbench.errors import InputError
from workbench.models.model import DiffusionModel

_NUMBER = "number"
"""What a number is said under that JSON has no word for: ``{"number": "-inf"}``."""


class SchedulerSpec(BaseModel):
    """A scheduler of diffusers.

    Attributes:
        name: its class.
        config: its configuration; numbers that are not finite are ``{"number": "inf"}``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z]\w*$", max_length=100)
    config: dict[str, JsonValue] = Field(default_factory=dict)

    @classmethod
    def of(cls, model: DiffusionModel) -> Self | None:
        """Return the scheduler that a model has now; None if it has none by that name.

        Raises:
            InputError: it is not one of diffusers', or its configuration is no plain data.
        """
        scheduler = _scheduler_of(model)
        if scheduler is None:
            return None
        kind = type(scheduler)
        if getattr(diffusers, kind.__name__, None) is not kind:
            raise InputError(
                f"The scheduler, {kind.__name__}, is not one of diffusers', so neither a script nor a file "
                "can make it."
            )
        try:
            return cls(name=kind.__name__, config=json.loads(json.dumps(_said(config_of(scheduler)))))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"The configuration of the scheduler, {kind.__name__}, is no plain data: {error}"
            ) from error

    @property
    def told(self) -> dict[str, Any]:
        """The configuration as Python has it."""
        meant: dict[str, Any] = _meant(self.config)
        return meant

    def made(self) -> Any:
        """Return the scheduler.

        Raises:
            InputError: diffusers has none of that name, or it does not take the configuration.
        """
        kind = getattr(diffusers, self.name, None)
        if not isinstance(kind, type) or not issubclass(kind, SchedulerMixin):
            raise InputError(
                f"scheduler={self.name!r} is no scheduler of diffusers {diffusers.__version__}. Give the "
                "name of one, such as 'DDIMScheduler', or leave it out for the model's own."
            )
        try:
            return kind.from_config(self.told)  # type: ignore[attr-defined]
        except Exception as error:
            raise InputError(
                f"{self.name} of diffusers {diffusers.__version__} does not take the experiment's "
                f"configuration of it: {error}"
            ) from error


def put_scheduler(model: DiffusionModel, spec: SchedulerSpec | None) -> None:
    """Let a model have a scheduler from now on, unless it has one just like it; None changes nothing.

    Raises:
        InputError: it cannot be made, or the model has no place for it.
    """
    if spec is None:
        return
    if _scheduler_of(model) is None:
        raise InputError(
            f"The experiment brings a scheduler, {spec.name}, and {model.reference or 'this model'} has none "
            "to exchange. Leave it out: experiment.model_copy(update={'scheduler': None})."
        )
    made = spec.made()
    now = model.pipeline.scheduler
    if type(now) is not type(made) or _said(config_of(now)) != _said(config_of(made)):
        model.pipeline.scheduler = made


@contextmanager
def sampling(model: DiffusionModel, spec: SchedulerSpec | None) -> Iterator[None]:
    """Let a model have a scheduler for a while, see `put_scheduler`."""
    before = _scheduler_of(model) if spec is not None else None
    try:
        put_scheduler(model, spec)
        yield
    finally:
        if before is not None and model.pipeline.scheduler is not before:
            model.pipeline.scheduler = before


def other_scheduler(model: DiffusionModel) -> SchedulerSpec | None:
    """Return a model's scheduler, if that is not what was saved with it.

    Raises:
        InputError: as `SchedulerSpec.of`.
    """
    scheduler = _scheduler_of(model)
    return None if scheduler is None or _as_saved(model.reference, scheduler) else SchedulerSpec.of(model)


def config_of(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's configuration, without what diffusers notes in it besides."""
    return {name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")}


def _scheduler_of(model: DiffusionModel) -> Any:
    pipeline = model.pipeline
    return getattr(pipeline, "scheduler", None) if isinstance(pipeline, DiffusionPipeline) else None


def _as_saved(reference: str, scheduler: Any) -> bool:
    if not reference:
        return False
    home = str(zoo.path(reference)) if reference in zoo.models() else reference
    kind = type(scheduler)
    try:
        saved = DiffusionPipeline.load_config(home)["scheduler"][1]
        return kind.__name__ == saved and config_of(
            kind.from_pretrained(home, subfolder="scheduler")
        ) == config_of(scheduler)
    except (OSError, KeyError, TypeError):
        return False


def _said(value: Any) -> Any:
    """Return a configuration as plain data."""
    if isinstance(value, dict):
        return {name: _said(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_said(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {_NUMBER: str(value)}
    return _said(value.tolist()) if hasattr(value, "tolist") else value


def _meant(value: Any) -> Any:
    """Return what plain data says."""
    if isinstance(value, dict):
        if set(value) == {_NUMBER}:
            return float(value[_NUMBER])
        return {name: _meant(each) for name, each in value.items()}
    return [_meant(each) for each in value] if isinstance(value, list) else value
