"""The layer × step map of one pair of runs: a sweep beside the loop of whole runs that it stands for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle

from tests.benchmarks.table import OTHER, PROMPT, Row, Setting
from workbench import DiffusionModel, Experiment, Patch, Sweep
from workbench.models.outline import patch_sites
from workbench.models.shapes import Shapes


def rows(setting: Setting) -> Iterator[Row]:
    """Yield how much faster the map is than its loop, measured by latents and by pictures."""
    model = DiffusionModel(setting.model)
    model.pipeline.set_progress_bar_config(disable=True)
    seen, arguments = Shapes(), {"seed": 0, "num_inference_steps": setting.steps}
    model.record(PROMPT, capture=[seen], **arguments)
    sites = [str(site) for site in patch_sites(model.denoisers, seen)]
    source = model.record(OTHER, capture=sites, **arguments)
    pair = Experiment(source=OTHER, target=PROMPT, num_inference_steps=setting.steps)
    cells = [(site, step) for step in range(setting.steps) for site in sites]
    # Evenly over the map: a patch costs the same at each step of a whole run, but not at each layer.
    some = cycle(cells[:: max(1, len(cells) // setting.rounds)])
    for metric, what in (("towards_latents", "latents"), ("towards", "pictures")):
        loop: list[float] = []

        def take_turn(_: object, loop: list[float] = loop) -> None:
            site, step = next(some)
            began = time.perf_counter()
            patch = Patch(site, source=source, steps=step, branch="cond")
            model.record(PROMPT, interventions=[patch], **arguments)
            loop.append(time.perf_counter() - began)

        sweep = Sweep(
            pair,
            {"site": sites, "step": range(setting.steps), "seed": [0]},
            metrics=[metric],
            controls=False,
        )
        began = time.perf_counter()
        sweep.run(model, progress=take_turn)
        swept = time.perf_counter() - began - sum(loop)
        whole = sum(loop) / len(loop) * len(cells)
        yield Row(
            f"map of {len(sites)} layers × {setting.steps} steps, measured by its {what}",
            f"{swept:.0f} s, a loop of whole runs {whole:.0f} s ({len(loop)} of {len(cells)} timed, taking "
            f"turns): {whole / swept:.1f} times faster",
        )
