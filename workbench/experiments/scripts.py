"""An experiment as a script: against the workbench, or against diffusers and torch alone.

Everything a user typed enters a script through ``repr``, so that a prompt stays a string whatever it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from workbench import zoo
from workbench.errors import InputError
from workbench.experiments.experiment import Experiment, PatchSpec
from workbench.models.loop import Loop
from workbench.models.model import DiffusionModel
from workbench.tracing.ledger import ALL, Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site
from workbench.tracing.structure import Leaf, leaves


def workbench_code(experiment: Experiment, model: DiffusionModel | None = None) -> str:
    """Return the experiment as Python against the workbench.

    A model made in memory has no name to open it by; the code then takes it from ``pipeline``, and a loop
    from the function of its name and its ``components``.

    Args:
        experiment: what to write.
        model: the model it is of, if that is open.
    """
    settings = {**experiment.settings(), "seed": experiment.seed}
    capture = [f"capture={list(experiment.captures())!r}"] if experiment.patches else []
    prompts = [[] if prompt is None else [repr(prompt)] for prompt in (experiment.source, experiment.target)]
    own = experiment.source_seed
    noise = "**settings" if own is None else f"**{{**settings, 'seed': {own}}}"
    leaving = experiment.source_from
    target = _call("target = model.record", [*prompts[1], "**settings"])
    lines = [
        "import workbench as wb",
        "",
        *_opening(experiment, model),
        "settings = {",
        *(f"    {name!r}: {value!r}," for name, value in settings.items()),
        "}",
    ]
    if leaving:
        prompt = [f"prompt={each}" for each in prompts[0]]
        lines += [*target, *_call("source = target.fork", [repr(leaving), *prompt, *capture])]
    else:
        lines += _call("source = model.record", [*prompts[0], *capture, noise])
    if experiment.patches:
        lines += [
            *(["patched = target.fork(", f"    {leaving},"] if leaving else ["patched = model.record("]),
            *([] if leaving else [f"    {each}," for each in prompts[1]]),
            "    interventions=[",
            *(line for patch in experiment.patches for line in _patch_lines(patch, leaving)),
            "    ],",
            *([] if leaving else ["    **settings,"]),
            ")",
            "patched.images[0]",
        ]
    else:
        lines += [*([] if leaving else target), "target.images[0]"]
    return "\n".join(lines) + "\n"


def _opening(experiment: Experiment, model: DiffusionModel | None) -> list[str]:
    loop = None if model is None else model.pipeline
    if not isinstance(loop, Loop):
        return [f"model = wb.DiffusionModel({repr(experiment.model) if experiment.model else 'pipeline'})"]
    asked = {"samples": loop.samples, "branches": loop.branches}
    further = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
    return _call("model = wb.trace_loop", [loop.__name__, "components=components", *further])


def _call(function: str, arguments: Sequence[str]) -> list[str]:
    """Return a call as it is written: in one line, or an argument a line where that would be long."""
    line = f"{function}({', '.join(arguments)})"
    return [line] if len(line) <= 80 else [f"{function}(", *(f"    {each}," for each in arguments), ")"]


def standalone_code(experiment: Experiment, source: Record, target: Record) -> str:
    """Return the experiment as a script that needs diffusers and torch alone.

    Args:
        experiment: what to run.
        source: its source's run, whose ledger says which calls are which.
        target: its target's run.

    Raises:
        InputError: the model was built in memory, so a script cannot open it, or a patch is at a site that
            plain hooks on modules do not reach.
    """
    parts = [_HEAD, _constants(experiment, source, target)]
    if experiment.acting(target.ledger.steps):
        parts += [_PATCHED, _LEAVING if experiment.source_from else _OWN]
    else:
        parts += [_PLAIN]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _patch_lines(patch: PatchSpec, leaving: int) -> list[str]:
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


def _model_code(experiment: Experiment) -> str:
    if not experiment.model:
        raise InputError(
            "This model was made in memory, so a script could not open it. Save it with "
            "model.save_pretrained(folder) and open that folder. A loop of your own fits a script on the "
            "workbench: format='workbench'."
        )
    if experiment.model in zoo.models():
        return repr(str(zoo.path(experiment.model)))
    folder = Path(experiment.model).expanduser()
    return repr(str(folder.resolve()) if folder.is_dir() else experiment.model)


def _constants(experiment: Experiment, source: Record, target: Record) -> str:
    lines = [
        f"MODEL = {_model_code(experiment)}",
        f"SOURCE = {_run_of(experiment.source, experiment.source_seed, experiment.seed)!r}",
        f"TARGET = {_run_of(experiment.target, None, experiment.seed)!r}",
        f"SETTINGS = {experiment.settings()!r}",
        f"THREADS = {torch.get_num_threads()}  # as in the run: on a CPU the last bits depend on it",
    ]
    patches = experiment.acting(target.ledger.steps)
    if patches:
        lines += [
            "",
            '# Each patch: the module, the part of what it returns (or "input"), and which denoiser calls of',
            "# the one run get which call of the other, with the rows of the batch as (branch, of branches).",
            "PATCHES = [",
            *(f"    {_patch_plan(patch, source, target)}," for patch in patches),
            "]",
            f"DENOISERS = {sorted({row.component for row in (*source.ledger, *target.ledger)})!r}",
            *(_shared_lines(experiment, source, target) if experiment.source_from else []),
        ]
    return "\n".join(lines)


def _run_of(prompt: str | None, own_seed: int | None, seed: int) -> dict[str, Any]:
    words = {} if prompt is None else {"prompt": prompt}
    return {**words, "seed": seed if own_seed is None else own_seed}


def _shared_lines(experiment: Experiment, source: Record, target: Record) -> list[str]:
    """Return the constant that makes the source's run the target's up to where it leaves."""
    shared = [row for row in target.ledger if row.step < experiment.source_from]
    if any(row.branches != source.ledger[row.call].branches for row in shared):
        raise InputError(
            "The source and the target do not call the denoiser alike, so a script cannot make the one from "
            "the other. Export this one as a script on the workbench: format='workbench'."
        )
    plans = []
    for component in sorted({row.component for row in shared}):
        mine = [row for row in shared if row.component == component]
        leaf = next(iter(leaves(target.calls[mine[0].call])))[0]
        plans.append(
            repr((component, "output", leaf, {row.call: (row.call, _all_rows(row)) for row in mine}))
        )
    return [
        "",
        "# What the source shares with the target: up to where it leaves, the denoiser's own outputs.",
        "SHARED = [",
        *(f"    {plan}," for plan in plans),
        "]",
    ]


def _patch_plan(patch: PatchSpec, source: Record, target: Record) -> str:
    site = Site.parse(patch.site)
    denoisers = {row.component for row in target.ledger}
    if site.port not in ("output", "input") or site.path.partition(".")[0] not in denoisers:
        raise InputError(
            f"A standalone script patches the output or input of a denoiser's module, not {patch.site}. "
            "Export this one as a script on the workbench: format='workbench'."
        )
    chosen = (
        range(target.ledger.steps) if patch.steps is None else [s % target.ledger.steps for s in patch.steps]
    )
    calls: dict[int, tuple[int, list[tuple[int, int, int, int]]]] = {}
    for row in target.ledger:
        branches = row.branches if patch.branch == ALL else [b for b in row.branches if b == patch.branch]
        if row.step not in chosen or not branches:
            continue
        rows = []
        for branch in branches:
            alike = list(target.ledger.at(row.step, branch))
            given = source.ledger.at(row.step, branch)[[each.call for each in alike].index(row.call)]
            rows.append(
                (
                    row.branches.index(branch),
                    len(row.branches),
                    given.branches.index(branch),
                    len(given.branches),
                )
            )
        calls[row.call] = (given.call, rows)
    return repr((site.path, site.port, _leaf(site, source), calls))


def _all_rows(row: Row) -> list[tuple[int, int, int, int]]:
    count = len(row.branches)
    return [(index, count, index, count) for index in range(count)]


def _leaf(site: Site, source: Record) -> Leaf:
    """Return where in the value the tensor is, spelled out also where the site leaves it to us."""
    if site.leaf:
        return site.leaf
    found = list(leaves(source.passages(site)[0].value))
    return found[0][0] if len(found) == 1 else ()


_HEAD = '''
"""An activation patch between two runs, exported by Diffusion Workbench.

Needs diffusers and torch alone. Run it: python SCRIPT [--model FOLDER_OR_HUB_ID] [--out IMAGE.png]
"""

import argparse

import torch
from diffusers import DiffusionPipeline
'''

_OPEN = '''
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=MODEL, help="folder or Hub id of the pipeline")
parser.add_argument("--out", default="patched.png", help="where the image goes")
options = parser.parse_args()

torch.set_num_threads(THREADS)
pipeline = DiffusionPipeline.from_pretrained(options.model)


def generate(seed, **words):
    """Run the pipeline with the experiment's settings and noise."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(**words, generator=generator, **SETTINGS).images[0]
'''

_PLAIN = (
    _OPEN
    + """

generate(**TARGET).save(options.out)
"""
)

_PATCHED = (
    _OPEN
    + '''

class Calls:
    """Counts the denoiser's calls, the clock that the patches are written against."""

    now = None
    made = 0

    def enter(self, module, inputs):
        self.now = self.made
        self.made += 1

    def leave(self, module, inputs, output):
        self.now = None


def pick(value, leaf):
    """Return the part of a module's value that a patch is about."""
    for key in leaf:
        value = value[key]
    return value


def put(value, leaf, new):
    """Return the value with that part replaced."""
    if not leaf:
        return new
    changed = put(value[leaf[0]], leaf[1:], new)
    if isinstance(value, (tuple, list)):
        return type(value)(changed if i == leaf[0] else each for i, each in enumerate(value))
    return type(value)(**{**value, leaf[0]: changed})


def rows(tensor, index, count):
    """Return one guidance branch's rows of a batch that holds several, one after the other."""
    width = tensor.shape[0] // count
    return slice(index * width, (index + 1) * width)


def hook(module, port, seen):
    """Let ``seen`` look at, and perhaps replace, a module's input or output at each call."""
    if port == "output":
        return module.register_forward_hook(lambda module, inputs, output: seen(output))

    def first(module, inputs, named):
        if inputs:
            return (seen(inputs[0]), *inputs[1:]), named
        name = next(iter(named))
        return inputs, {**named, name: seen(named[name])}

    return module.register_forward_pre_hook(first, with_kwargs=True)


def run(which, keeps=(), puts=()):
    """Generate one of the two; keep what the patches in ``keeps`` need, put what those in ``puts`` say."""
    calls = Calls()
    hooks = []
    for name in DENOISERS:
        denoiser = getattr(pipeline, name)
        hooks.append(denoiser.register_forward_pre_hook(calls.enter))
    for look, patches in ((keep, keeps), (put_in, puts)):
        for patch in patches:
            name, _, rest = patch[0].partition(".")
            module = getattr(pipeline, name).get_submodule(rest)

            def seen(value, look=look, patch=patch):
                return look(patch, calls.now, value)

            hooks.append(hook(module, patch[1], seen))
    for name in DENOISERS:
        hooks.append(getattr(pipeline, name).register_forward_hook(calls.leave))
    try:
        return generate(**which)
    finally:
        for each in hooks:
            each.remove()


kept = {}


def keep(patch, call, value):
    """In the one run: keep what the patch will need."""
    path, port, leaf, plan = patch
    if call in {given for given, _ in plan.values()}:
        kept[path, port, leaf, call] = pick(value, leaf).clone()
    return value


def put_in(patch, call, value):
    """In the other run: put the activation in."""
    path, port, leaf, plan = patch
    if call not in plan:
        return value
    given, branches = plan[call]
    changed, source = pick(value, leaf).clone(), kept[path, port, leaf, given]
    for index, count, source_index, source_count in branches:
        changed[rows(changed, index, count)] = source[rows(source, source_index, source_count)]
    return put(value, leaf, changed)
'''
)

_OWN = """
run(SOURCE, keeps=PATCHES)
run(TARGET, puts=PATCHES).save(options.out)
"""

_LEAVING = """
run(TARGET, keeps=SHARED)
run(SOURCE, keeps=PATCHES, puts=SHARED)  # the target's run up to where the source leaves it
run(TARGET, puts=PATCHES).save(options.out)
"""
