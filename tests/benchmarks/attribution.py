"""The whole map of patches, estimated: its time beside a loop of whole runs, and how well it agrees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import numpy as np

from tests.benchmarks.table import OTHER, PROMPT, Row, Setting
from workbench import DiffusionModel, Patch
from workbench.experiments.attribution import attribute
from workbench.experiments.experiment import Experiment
from workbench.models.outline import patch_sites
from workbench.models.shapes import Shapes

CELLS = 16
"""How many cells of the loop are run, each a whole run: the others would take as long."""

CHECKED = 40
"""How many cells of each pair are patched to compare with."""

PAIRS = (
    ("a red circle on a dark background", "a blue circle on a dark background"),
    ("a green square on a light background", "a purple square on a light background"),
    ("a yellow triangle on a dark background", "a red triangle on a dark background"),
    (OTHER, PROMPT),
)
"""Sources and targets whose first object has another colour."""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield how many times faster the estimate is than the loop, and the rank correlations."""
    model = DiffusionModel(setting.model)
    model.pipeline.set_progress_bar_config(disable=True)
    seen = Shapes()
    experiment = _experiment(*PAIRS[0], seed=0, steps=setting.steps)
    target = experiment.run_target(model, capture=(seen,))
    sites = patch_sites(model.denoisers, seen)
    source = experiment.run_source(model, target, capture=tuple(map(str, sites)))
    patches = [
        Patch(
            str(sites[cell % len(sites)]), source=source, steps=cell * setting.steps // CELLS, branch="cond"
        )
        for cell in range(CELLS)
    ]
    arguments = {"seed": experiment.seed, **experiment.settings()}
    ratios, cells = [], len(sites) * setting.steps
    for _ in range(min(setting.rounds, 3)):
        began = time.perf_counter()
        for patch in patches:
            model.record(experiment.target, interventions=[patch], **arguments)
        between = time.perf_counter()
        attribute(experiment, source, target, sites)
        ended = time.perf_counter()
        ratios.append((between - began) / CELLS * cells / (ended - between))
    yield Row(
        f"{len(sites)} sites × {setting.steps} steps estimated by attribution, beside a loop of {cells} "
        f"whole runs ({CELLS} were timed and scaled)",
        f"{median(ratios):.0f} times faster ({min(ratios):.0f} to {max(ratios):.0f})",
    )
    for points in (1, 4):
        found = [
            _agreement(model, _experiment(*pair, seed=seed, steps=setting.steps), sites, points)
            for seed, pair in enumerate(PAIRS)
        ]
        at = "at the target alone" if points == 1 else f"at {points} points"
        yield Row(
            f"its rank correlation with the patches of {CHECKED} cells, one step each: derivatives {at}, "
            f"{len(PAIRS)} pairs of prompts",
            f"median {np.median(found):.2f} ({', '.join(f'{each:.2f}' for each in found)})",
        )


def _experiment(source: str, target: str, *, seed: int, steps: int) -> Experiment:
    return Experiment(source=source, target=target, seed=seed, num_inference_steps=steps, guidance_scale=3.0)


def _agreement(model: DiffusionModel, experiment: Experiment, sites: list, points: int) -> float:
    target = experiment.run_target(model)
    source = experiment.run_source(model, target)
    found = attribute(experiment, source, target, sites, check=CHECKED, points=points).agreement
    return found.correlation
