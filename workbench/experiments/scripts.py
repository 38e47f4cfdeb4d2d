"""An experiment as a script against the workbench.

Everything a user typed enters a script through ``repr``, so that a prompt stays a string whatever it holds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from workbench.experiments.change import Change
from workbench.experiments.changes import AnySpec, TurnSpec
from workbench.experiments.experiment import Experiment
from workbench.experiments.opening import Opening
from workbench.experiments.site_changes import ModuleSpec, PatchSpec
from workbench.experiments.spec import CARRIED
from workbench.models.loop import Loop
from workbench.models.model import DiffusionModel
from workbench.tracing.ledger import ALL


def workbench_code(
    experiment: Experiment, model: DiffusionModel | None = None, *, allow_code: bool = False
) -> str:
    """Return the experiment as Python against the workbench.

    Runs and plain patches are written out; other interventions, branches and what pins a model stay the
    data they are, in one `Experiment`.

    A model made in memory has no name to open it by; the code then takes it from ``pipeline``, and a loop
    from the function of its name and its ``components``.

    Args:
        experiment: what to write.
        model: the model it is of, if that is open.
        allow_code: whether the script may import what the experiment names as modules of one's own.
    """
    if not _is_plain(experiment):
        return _as_data(experiment, model, allow_code=allow_code)
    settings = {**experiment.settings(), "seed": experiment.seed}
    capture = [f"capture={list(experiment.captures())!r}"] if experiment.interventions else []
    prompts = [[] if prompt is None else [repr(prompt)] for prompt in (experiment.source, experiment.target)]
    own = experiment.source_seed
    noise = "**settings" if own is None else f"**{{**settings, 'seed': {own}}}"
    leaving = experiment.source_from
    target = _call("target = model.record", [*prompts[1], "**settings"])
    lines = [
        "import workbench as wb",
        "",
        *_opening(experiment, model, _opening_of(experiment, model, as_data=False)),
        "settings = {",
        *(f"    {name!r}: {value!r}," for name, value in settings.items()),
        "}",
    ]
    if leaving:
        prompt = [f"prompt={each}" for each in prompts[0]]
        lines += [*target, *_call("source = target.fork", [repr(leaving), *prompt, *capture])]
    else:
        lines += _call("source = model.record", [*prompts[0], *capture, noise])
    if experiment.interventions:
        lines += [
            *(["patched = target.fork(", f"    {leaving},"] if leaving else ["patched = model.record("]),
            *([] if leaving else [f"    {each}," for each in prompts[1]]),
            "    interventions=[",
            *(line for each in experiment.interventions for line in _patch_lines(each, leaving)),
            "    ],",
            *([] if leaving else ["    **settings,"]),
            ")",
            "patched.images[0]",
        ]
    else:
        lines += [*([] if leaving else target), "target.images[0]"]
    return "\n".join(lines) + "\n"


def _is_plain(experiment: Experiment) -> bool:
    """Whether all there is are two runs of one model and patches of whole values between them."""
    known = {"kind", "site", "steps", "branch"}
    names = ("forks", "revision", "weights", "source_model", "picture")
    further = [getattr(experiment, name) for name in names]
    return not any(further) and all(
        isinstance(each, PatchSpec) and not each.model_dump(exclude=known, exclude_defaults=True)
        for each in experiment.interventions
    )


def _as_data(experiment: Experiment, model: DiffusionModel | None, *, allow_code: bool) -> str:
    given = said(experiment)
    fields = [f"    {name}={literal(value, 4)}," for name, value in given.items()]
    opening = opening_lines(experiment, model)
    arguments = ["model"] if opening else []
    if any(isinstance(each, ModuleSpec) for each in experiment.every_change()):
        # Whoever only reads the file of an experiment has not agreed to what it imports.
        arguments += ["allow_code=True"] if allow_code else []
    last = "target" if not experiment.interventions else "patched"
    lines = [
        "import workbench as wb",
        "",
        *opening,
        "experiment = wb.Experiment(",
        *fields,
        ")",
        f"outcome = experiment.run({', '.join(arguments)})",
        f"outcome.{last}.images[0]",
    ]
    return "\n".join(lines) + "\n"


def opening_lines(experiment: Experiment, model: DiffusionModel | None) -> list[str]:
    """Return what opens a model, where its name alone would not give it as it is open here."""
    opening = _opening_of(experiment, model, as_data=True)
    return [] if experiment.model and opening == Opening() else _opening(experiment, model, opening)


def said(part: BaseModel) -> dict[str, Any]:
    """Return data without what is said by leaving it out."""
    told: dict[str, Any] = {"kind": part.kind} if isinstance(part, Change | TurnSpec) else {}
    for name, value in part:
        if value != type(part).model_fields[name].get_default(call_default_factory=True):
            several = isinstance(value, tuple) and value and isinstance(value[0], BaseModel)
            one = said(value) if isinstance(value, BaseModel) else value
            told[name] = [said(each) for each in value] if several else one
    return told


class Code(str):
    """Text that is code already, so that it is written without quotes."""

    def __repr__(self) -> str:
        return str(self)


def literal(value: Any, indent: int = 0) -> str:
    """Write data as Python, in one line or, where that would be long, an entry a line."""
    value = _sayable(value)
    line = repr(value)
    if len(line) + indent <= _WIDTH or not isinstance(value, (dict, list)) or not value:
        return line
    inner = " " * (indent + 4)
    pairs = value.items() if isinstance(value, dict) else ((None, each) for each in value)
    entries = [("" if key is None else f"{key!r}: ") + literal(each, indent + 4) for key, each in pairs]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([start, *(f"{inner}{each}," for each in entries), " " * indent + end])


def _sayable(value: Any) -> Any:
    """Return data with what ``repr`` cannot say, numbers that are not finite, as code."""
    if isinstance(value, float) and not math.isfinite(value):
        return Code(f'float("{value}")')
    if type(value) is dict:
        return {name: _sayable(each) for name, each in value.items()}
    return type(value)(map(_sayable, value)) if type(value) in (list, tuple) else value


_WIDTH = 80
"""Characters of a line of exported code, but for what cannot be parted."""


def _opening(experiment: Experiment, model: DiffusionModel | None, opening: Opening) -> list[str]:
    loop = None if model is None else model.pipeline
    if not isinstance(loop, Loop):
        return _opened(repr(experiment.model) if experiment.model else "pipeline", opening)
    asked = {"samples": loop.samples, "branches": loop.branches}
    further = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
    return _call("model = wb.trace_loop", [loop.__name__, "components=components", *further])


def _opening_of(experiment: Experiment, model: DiffusionModel | None, *, as_data: bool) -> Opening:
    """Return how a script opens a model; an `Experiment` in it brings its scheduler itself."""
    opening = Opening() if model is None else Opening.of(model)
    own = experiment.scheduler
    return opening if own is None else replace(opening, scheduler=None if as_data else own)


def _opened(reference: str, opening: Opening) -> list[str]:
    """Return the lines that open a model as it is open here."""
    dtype = f", torch_dtype={opening.dtype}" if opening.dtype else ""
    lines = ["import torch", ""] if opening.dtype else []
    if opening.scheduler is not None:
        lines += [f"from diffusers import {opening.scheduler.name}", ""]
    lines.append(f"model = wb.DiffusionModel({reference}{dtype})")
    if opening.device:
        lines.append(f"model.to({opening.device!r})")
    if opening.scheduler is not None:
        made = f"{opening.scheduler.name}.from_config({literal(opening.scheduler.told)})"
        lines.append(f"model.pipeline.scheduler = {made}")
    return lines


def _call(function: str, arguments: Sequence[str]) -> list[str]:
    """Return a call as it is written: in one line, or an argument a line where that would be long."""
    line = f"{function}({', '.join(arguments)})"
    return [line] if len(line) <= _WIDTH else [f"{function}(", *(f"    {each}," for each in arguments), ")"]


def _patch_lines(patch: AnySpec, leaving: int) -> list[str]:
    assert isinstance(patch, PatchSpec)
    arguments = [repr(patch.site), "source=source"]
    if patch.steps is not None:
        # Before the source leaves, it is the target's own run and a patch changes nothing.
        acting = [step for step in patch.steps if step < 0 or step >= leaving]
        if not acting:
            return []
        arguments.append(f"steps={_steps_code(acting)}")
    elif leaving:
        arguments.append(f"steps=range({leaving}, target.ledger.steps)")
    if patch.branch != ALL:
        arguments.append(f"branch={patch.branch!r}")
    return ["        wb.Patch(", *(f"            {each}," for each in arguments), "        ),"]


def _steps_code(steps: Sequence[int]) -> str:
    first, last = steps[0], steps[-1]
    contiguous = list(steps) == list(range(first, last + 1))
    return f"range({first}, {last + 1})" if contiguous and len(steps) > 1 else repr(list(steps))


def carrying(code: str, experiment: Experiment) -> str:
    """Return a script with its experiment in a comment, which `Experiment.load` reads again."""
    data = json.dumps(experiment.model_dump(mode="json", exclude_defaults=False))
    return f"{code}\n{CARRIED}{data}\n"


def notebook(code: str, experiment: Experiment | None = None) -> str:
    """Return a script as a notebook of one cell, nbformat 4.5, with its experiment in another."""
    texts = {"experiment": code}
    if experiment is not None:
        texts["data"] = carrying("", experiment).strip()
    cells: list[dict[str, Any]] = [
        {
            "cell_type": "code",
            "id": name,
            "metadata": {},
            "outputs": [],
            "execution_count": None,
            "source": text,
        }
        for name, text in texts.items()
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1) + "\n"
