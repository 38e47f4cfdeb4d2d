"""What the commands about experiments do; each gives the lines to print."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from workbench import zoo
from workbench.errors import InputError, WorkbenchError
from workbench.experiments.branching import named
from workbench.experiments.experiment import Experiment
from workbench.experiments.exporting import exported, write
from workbench.experiments.metrics import towards
from workbench.experiments.site_changes import PatchSpec
from workbench.experiments.sweep import Sweep
from workbench.experiments.sweeping import Progress
from workbench.models.folder import read_index
from workbench.models.model import DiffusionModel
from workbench.models.outline import patch_sites
from workbench.models.shapes import Shapes
from workbench.tracing.record import Record
from workbench.tracing.storage.saved import load_record

DEMO = Experiment(
    model="shapes-unet",
    source="a red circle",
    target="a blue circle",
    num_inference_steps=20,
    guidance_scale=3.0,
    source_from=10,
    interventions=(
        PatchSpec(site="unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2", branch="cond"),
    ),
)
"""The colour of one run, put into another through one layer."""


def demonstrate(out: Path) -> Iterator[str]:
    """Run the demonstration and write its experiment beside the pictures."""
    yield from perform(DEMO, out)
    yield f"{DEMO.save(out / 'experiment.json')}: run it again with workbench run"


def shipped() -> Iterator[str]:
    """List the models of the zoo."""
    for name in zoo.models():
        folder = zoo.path(name)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        yield f"{name:<16}{size / 1e6:5.1f} MB   {read_index(folder)['_class_name']}"


def components(model: str) -> Iterator[str]:
    """List the components of a model with their parameters, from its configuration alone."""
    opened = DiffusionModel(model, dispatch=False)
    for name, part in opened.components.items():
        parameters = getattr(part, "parameters", None)
        count = sum(each.numel() for each in parameters()) if callable(parameters) else 0
        yield f"{name:<18}{type(part).__name__:<34}" + (f"{count / 1e6:8.2f} M" if count else "")


def perform(
    experiment: Experiment, out: Path, *, allow_code: bool = False, records: bool = False
) -> Iterator[str]:
    """Run an experiment and save what it leaves."""
    _make(out)
    with _refusals():
        outcome = experiment.run(allow_code=allow_code)
    runs = {"source": outcome.source, "target": outcome.target}
    if outcome.patched is not None:
        runs["patched"] = outcome.patched
    runs.update(named(outcome.branches))
    for name, run in runs.items():
        yield from _saved(run, out, name)
        if records:
            yield str(run.save(out / f"{name}-record"))
    if outcome.patched is not None:
        pictures = [run.images[0] for run in (outcome.patched, outcome.target, outcome.source)]
        yield f"towards the source: {towards(*pictures):.0%}"


def survey(
    experiment: Experiment,
    out: Path,
    *,
    sites: Sequence[str] | None,
    steps: Sequence[int] | None,
    window: str,
    seeds: int,
    metrics: Sequence[str] | None,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[str]:
    """Sweep over sites and steps; the map is in ``map.csv``, and what a sweep resumes from beside it."""
    if experiment.num_inference_steps is None:
        raise InputError("A sweep needs num_inference_steps in its experiment.")
    model = experiment.open()
    axes: dict[str, Any] = {
        "site": list(sites or _sites_of(model, experiment)),
        "step": list(steps or range(experiment.num_inference_steps)),
        "seed": list(range(experiment.seed, experiment.seed + seeds)),
    }
    measured = Sweep(experiment.plain(), axes, window=window, metrics=list(metrics or ["towards"]))
    _make(out)
    with _refusals():
        found = measured.run(model, out / "cells", progress=progress)
    table = out / "map.csv"
    found.to_dataframe().to_csv(table)
    yield f"{table}: {found.sizes['site']} sites × {found.sizes['step']} steps × {seeds} seeds"
    mean = found[f"{measured.metrics[0].name}_mean"]
    for place in np.argsort(-mean.values, axis=None)[:5]:
        cell = {
            name: int(at) for name, at in zip(mean.dims, np.unravel_index(place, mean.shape), strict=True)
        }
        best = mean.isel(cell)
        yield f"{float(best):8.3f}  {best.site.item()}, step {best.step.item()}"


def written(experiment: Experiment, out: Path, *, standalone: bool, allow_code: bool = False) -> str:
    """Write an experiment as code; returns what was written."""
    if out.suffix not in (".py", ".ipynb"):
        raise InputError(f"{out} is neither a script nor a notebook: give a name that ends in .py or .ipynb.")
    format = "standalone" if standalone else "workbench"
    return str(write(exported(experiment, format, allow_code=allow_code, suffix=out.suffix), out))


def reopened(folder: Path, model: str | None) -> Record:
    """Return a saved record with the model that it is of, or another one."""
    record = load_record(folder)
    reference = model or record.spec.model
    if not reference:
        raise InputError(f"{folder} is of a model that was made in memory. Say what decodes it: --model.")
    return load_record(folder, model=DiffusionModel(reference))


def _make(folder: Path) -> None:
    """Make the folder that results go to, before anything is run for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error


@contextmanager
def _refusals() -> Iterator[None]:
    """Say in one line what a pipeline refuses of its own arguments."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        if isinstance(error, WorkbenchError):
            raise
        raise InputError(f"The run ended with {type(error).__name__}: {error}") from error


def _sites_of(model: DiffusionModel, experiment: Experiment) -> list[str]:
    seen = Shapes()
    first = {**experiment.settings(), "num_inference_steps": 1}
    model.record(experiment.target, seed=experiment.seed, capture=[seen], **first)
    return [str(site) for site in patch_sites(model.denoisers, seen)]


def _saved(run: Record, out: Path, name: str) -> Iterator[str]:
    for number, image in enumerate(run.images):
        path = out / (f"{name}.png" if len(run.images) == 1 else f"{name}-{number}.png")
        image.save(path)
        yield str(path)
