"""What the commands about experiments do; each gives the lines to print."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench import zoo
from workbench.cli.failing import FailedError, failing
from workbench.errors import InputError
from workbench.experiments.branching import named
from workbench.experiments.experiment import Experiment
from workbench.experiments.exporting import exported, write
from workbench.experiments.measure import arguments_of, metric
from workbench.experiments.measured import RunMetric
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
    with failing("The run"):
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
    out: Path | None,
    *,
    axes: Mapping[str, Sequence[str | int] | None],
    window: str,
    seeds: int,
    metrics: Sequence[str] | None,
    script: Path | None = None,
    standalone: bool = True,
    retry: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[str]:
    """Sweep over some axes; the map is in ``map.csv``, and what a sweep resumes from beside it.

    Args:
        experiment: of which the source and the target are taken.
        out: the folder to write to; None runs nothing.
        axes: values of each, as they were typed; where there are none, of ``site`` and ``step`` all are
            taken, and the others are no axes.
        window: see `Sweep`.
        seeds: how many, from the experiment's own on.
        metrics: what is measured, as they were typed.
        script: a file to write the sweep to.
        standalone: whether that needs diffusers and torch alone.
        retry: whether cells that failed before are run again.
        progress: told how far it is.

    Raises:
        FailedError: no cell could be measured.
    """
    if out is None and script is None:
        raise InputError(
            "Say where the map goes, --out FOLDER, or what to write the sweep to, --script FILE."
        )
    if experiment.num_inference_steps is None:
        raise InputError("A sweep needs num_inference_steps in its experiment.")
    with failing("The run"):
        model = experiment.open()
        sites = axes.get("site") or _sites_of(model, experiment)
    given: dict[str, Any] = {
        "site": list(sites),
        "step": list(axes.get("step") or range(experiment.num_inference_steps)),
        "branch": list(axes.get("branch") or ()),
        "heads": [_several(each, _head) for each in axes.get("heads") or ()],
        "words": [_several(each, str) for each in axes.get("words") or ()],
        "seed": list(range(experiment.seed, experiment.seed + seeds)),
    }
    given = {name: values for name, values in given.items() if values}
    asked = [_metric(each) for each in metrics or ("towards",)]
    measured = Sweep(experiment.plain(), given, window=window, metrics=asked)
    if script is not None:
        with failing("The export"):
            yield str(measured.export(script, "standalone" if standalone else "workbench", model))
    if out is not None:
        _make(out)
        with failing("The sweep"):
            found = measured.run(model, out / "cells", progress=progress, retry=retry)
        yield from _mapped(measured, found, out / "map.csv")


def _mapped(sweep: Sweep, found: Any, table: Path) -> Iterator[str]:
    """Write a map, and say where it is highest and what failed."""
    found.to_dataframe().to_csv(table)
    plural = {"branch": "branches", "heads": "heads", "words": "words"}
    yield f"{table}: " + " × ".join(
        f"{len(values)} {plural.get(name, name + 's')}" for name, values in sweep.axes.items()
    )
    mean = found[f"{sweep.metrics[0].name}_mean"]
    best = [place for place in np.argsort(-mean.values, axis=None) if np.isfinite(mean.values.flat[place])]
    for place in best[:5]:
        cell = {
            name: int(at) for name, at in zip(mean.dims, np.unravel_index(place, mean.shape), strict=True)
        }
        at = mean.isel(cell)
        rest = [f", {name} {at[name].item()}" for name in mean.dims if name != "site"]
        yield f"{float(at):8.3f}  {at.site.item()}" + "".join(rest)
    for name in (each for each in found if str(each).startswith("error")):
        what = str(name).removeprefix("error").strip("_")
        errors = [each for each in found[name].values.flat if each]
        told = f"{len(errors)} of {found[name].size} {what + ' controls' if what else 'cells'} failed"
        if not what and len(errors) == len(sweep.cells):
            raise FailedError(f"All {len(errors)} cells failed, the first with: {errors[0]}")
        yield f"{told}, the first with: {errors[0]}"


def _several(typed: str | int, of: Callable[[str], Any]) -> Any:
    """Return a value of an axis, or those that a ``+`` joins."""
    parts = [of(each.strip()) for each in str(typed).split("+")]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _head(typed: str) -> int:
    if not typed.isdecimal():
        raise InputError(f"--heads {typed!r} is no number of a head. Several at once are joined: 0+1.")
    return int(typed)


def _metric(typed: str) -> str | RunMetric:
    """Return a metric by its name, and what may stand behind a colon: ``colour:red``, ``ssim:to=source``."""
    name, colon, rest = typed.partition(":")
    if not colon:
        return name
    first = next(iter(arguments_of(name)), None)
    given: dict[str, Any] = {}
    for part in re.split(r",(?=\w+=)", rest):
        known, equals, value = part.partition("=")
        if not equals and first is None:
            raise InputError(f"--metric {typed}: {name} takes nothing. Write --metric {name}.")
        given.update({known: value} if equals else {str(first): part})
    return RunMetric(typed, metric(name, **given))


def written(experiment: Experiment, out: Path, *, standalone: bool, allow_code: bool = False) -> str:
    """Write an experiment as code; returns what was written."""
    if out.suffix not in (".py", ".ipynb"):
        raise InputError(f"{out} is neither a script nor a notebook: give a name that ends in .py or .ipynb.")
    format = "standalone" if standalone else "workbench"
    with failing("The export"):
        text = exported(experiment, format, allow_code=allow_code, suffix=out.suffix)
    return str(write(text, out))


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
