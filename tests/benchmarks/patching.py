"""From a click on the patch map to the patched image: a fork from half of the steps."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks import beside
from tests.benchmarks.table import OTHER, PROMPT, Row, Setting, milliseconds, take_turns
from workbench import DiffusionModel, Patch

SITE = "unet.mid_block"


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the time of a click, and of the same patch in a whole run."""
    model = DiffusionModel(setting.model)
    model.pipeline.set_progress_bar_config(disable=True)
    steps, half = setting.steps, setting.steps // 2
    source = model.record(OTHER, seed=0, num_inference_steps=steps, capture=[SITE])
    target = model.record(PROMPT, seed=0, num_inference_steps=steps)
    patch = Patch(SITE, source=source, steps=range(half, steps), branch="all")
    variants = {
        "fork": lambda: target.fork(half, interventions=[patch]).images[0],
        "whole": lambda: model.record(
            PROMPT, seed=0, num_inference_steps=steps, interventions=[patch]
        ).images[0],
    }
    other = beside.patching(setting)
    seconds = take_turns(variants | ({"nnsight": other} if other else {}), setting.rounds)
    yield Row(
        f"click to patched image, from step {half} of {steps}",
        milliseconds(seconds["fork"]),
        f"{milliseconds(seconds['nnsight'])} (the whole run)" if other else "",
    )
    yield Row("the same patch in a whole run", milliseconds(seconds["whole"]))
