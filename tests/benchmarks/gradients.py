"""What a derivative by a block in every step costs: its time beside the bare run's, and its memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from tests.benchmarks.processes import fresh
from tests.benchmarks.table import PROMPT, Row, Setting, ratio, take_turns
from workbench import DiffusionModel
from workbench.models.loading import locate

SITE = "unet.mid_block"
_PROGRAM = """
from workbench import DiffusionModel
from tests.benchmarks import gradients
gradients.variants(DiffusionModel({folder!r}), {steps})[{name!r}]()
"""
_BARE, _AGAIN, _KEPT = "the run alone", "every call computed again", "every call's graph kept"


def rows(setting: Setting) -> Iterator[Row]:
    """Yield time and peak memory of both ways to a derivative, beside the run without one."""
    model = DiffusionModel(setting.model)
    runs = variants(model, setting.steps)
    seconds = take_turns(runs, min(setting.rounds, 10))
    places = {"folder": str(locate(setting.model)), "steps": setting.steps}
    for name in runs:
        peak = median(fresh(_PROGRAM.format(name=name, **places))[1] for _ in range(3)) / 1024
        rounds = len(seconds[name])
        time = "" if name == _BARE else f"{ratio(seconds, name, _BARE)} of {rounds} rounds, "
        yield Row(f"derivative by {SITE} in {setting.steps} steps: {name}", f"{time}{peak:.0f} MiB peak")


def variants(model: DiffusionModel, steps: int) -> dict[str, Callable[[], Any]]:
    """Return the runs, by name; both derivatives are of the image's mean red."""
    model.pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": steps, "seed": 0}

    def kept() -> None:
        with model.generate(PROMPT, graph=None, **asked) as run:
            hidden = [model.unet.mid_block.output for _ in run.steps]
            run.gradient(model.site("vae.decode").output[0][:, 0].mean(), *hidden)

    return {
        _BARE: lambda: model.record(PROMPT, **asked),
        _AGAIN: lambda: model.gradient(PROMPT, of=lambda image: image[:, 0].mean(), wrt=SITE, **asked),
        _KEPT: kept,
    }
