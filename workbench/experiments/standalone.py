"""An experiment as a script that needs diffusers and torch alone.

Everything a user typed enters a script through ``repr``, so that a prompt stays a string whatever it holds.
The script says its changes as data, and the machine that makes them is the same in every script.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from workbench import zoo
from workbench.errors import InputError
from workbench.experiments.changes import (
    AblateSpec,
    PatchSpec,
    ScaleSpec,
    SiteChange,
    SteerSpec,
    TurnSpec,
)
from workbench.experiments.experiment import Experiment
from workbench.interventions.scale import drawn
from workbench.tracing.ledger import ALL, Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site
from workbench.tracing.structure import Leaf, leaves

_ELSE = "Export this one as a script on the workbench: format='workbench'."


def standalone_code(experiment: Experiment, source: Record, target: Record) -> str:
    """Return the experiment as a script that needs diffusers and torch alone.

    Args:
        experiment: what to run; of its branches, none is in the script.
        source: its source's run, whose ledger says which calls are which.
        target: its target's run.

    Raises:
        InputError: the model was built in memory, so a script cannot open it, or something is changed
            that plain hooks on modules do not reach.
    """
    acting = experiment.acting(target.ledger.steps)
    if experiment.source_model is not None:
        raise InputError(f"A standalone script has one model, and the source is of another. {_ELSE}")
    if not acting:
        return "\n\n".join(part.strip("\n") for part in (_HEAD, _constants(experiment), _OPEN, _PLAIN)) + "\n"
    plan = _Plan(experiment, source, target, acting)
    parts = (_HEAD, _constants(experiment), plan.constants(), _OPEN, _MACHINE, plan.ending())
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


class _Plan:
    """What a script does, call by call."""

    def __init__(self, experiment: Experiment, source: Record, target: Record, acting: Sequence[Any]) -> None:
        self.experiment = experiment
        self.source = source
        self.target = target
        self.steps = target.ledger.steps
        self.denoisers = {row.component for row in (*source.ledger, *target.ledger)}
        self.changes = [self._change(each) for each in acting if not isinstance(each, TurnSpec)]
        self.turns = [each for each in acting if isinstance(each, TurnSpec)]

    def constants(self) -> str:
        """Return the changes as data."""
        lines = [
            "# Each change: what to do where (the module, its port, the part of what passes there), and in",
            "# which of the denoiser's calls, to which rows of the batch, as (branch, of branches).",
            "CHANGES = [",
            *(f"    {change!r}," for change in self.changes),
            "]",
            f"DENOISERS = {sorted(self.denoisers)!r}",
        ]
        return "\n".join(lines)

    def ending(self) -> str:
        """Return the runs, in order."""
        lines, leaving, again = [], self.experiment.source_from, ""
        shared = {str(run) for change in self.changes for run in change.get("runs", ())}
        if "source" in shared:
            if leaving:
                self._check_alike(leaving)
                lines.append("run(TARGET)")
                again = f", again={self._reach(leaving)}"
                comment = "  # the target's run up to where it leaves"
                lines.append(f"run(SOURCE, keeps='source'{again}){comment}")
            else:
                lines.append("run(SOURCE, keeps='source')")
        others = dict.fromkeys(run for change in self.changes for run in change.get("runs", ()))
        for prompt in others:
            if prompt != "source":
                name = {"prompt": prompt[1], "seed": self.experiment.seed}
                lines.append(f"run({name!r}, keeps={prompt!r})")
        lines.append("image = run(TARGET, changes=CHANGES)")
        told: dict[str, Any] = {}
        for turn in self.turns:
            if turn.step >= self.steps:
                raise InputError(
                    f"The runs have {self.steps} steps; a turn at {turn.step} is in none of them."
                )
            told |= turn.changes()
            words = {name: value for name, value in told.items() if name == "prompt"}
            rest = {name: value for name, value in told.items() if name != "prompt"}
            lines.append(
                f"image = run({{**TARGET, **{words!r}}}, {{**SETTINGS, **{rest!r}}}, changes=CHANGES, "
                f"again={self._reach(turn.step)})"
            )
        return "\n".join([*lines, "image.save(options.out)"])

    def _reach(self, step: int) -> tuple[int, int]:
        """Return how many calls of the denoiser, and how many of the scheduler, come before a step."""
        first = self.target.ledger.at(step)[0]
        return first.call, first.tick

    def _check_alike(self, leaving: int) -> None:
        for row in self.target.ledger:
            if row.step < leaving and row.branches != self.source.ledger[row.call].branches:
                raise InputError(
                    "The source and the target do not call the denoiser alike, so a script cannot make the "
                    f"one from the other. {_ELSE}"
                )

    def _change(self, change: Any) -> dict[str, Any]:
        if not isinstance(change, PatchSpec | AblateSpec | ScaleSpec | SteerSpec):
            raise InputError(f"A standalone script cannot make the change {change.kind!r}. {_ELSE}")
        plan: dict[str, Any] = {
            "do": change.kind,
            "at": self._place(change.site),
            "calls": self._calls(change),
        }
        if change.words is not None or change.tokens is not None:
            plan["tokens"] = self._tokens(change)
        if change.strength != 1:
            plan["strength"] = change.strength
        if change.mask is not None:
            plan["mask"] = [list(row) for row in change.mask]
        if isinstance(change, ScaleSpec):
            plan["factor"] = change.factor
        elif isinstance(change, PatchSpec):
            plan |= {
                "runs": ["source"],
                "given": self._given(change),
                "from": self._place(change.captures[0]),
            }
            if (tokens := self._from_tokens(change)) is not None:
                plan["from_tokens"] = tokens
        elif isinstance(change, AblateSpec):
            plan |= self._ablation(change)
        else:
            runs = [("prompt", prompt) for pair in change.pairs for prompt in pair]
            plan |= {"runs": runs, "method": change.method, "seen": self._seen(change), "from": plan["at"]}
        return plan

    def _ablation(self, change: AblateSpec) -> dict[str, Any]:
        runs = [("prompt", prompt) for prompt in change.references]
        place = {"from": self._place(change.site), "given": self._given(change, self.target)}
        if change.how == "resample":
            return {**place, "do": "patch", "runs": [runs[drawn(change.seed, len(runs))]]}
        if change.how == "mean":
            return {**place, "do": "mean", "runs": runs}
        return {"do": change.how, **({"seed": change.seed} if change.how == "noise" else {})}

    def _place(self, spelled: str) -> tuple[str, str, Leaf]:
        site = Site.parse(spelled)
        if site.port not in ("output", "input") or site.path.partition(".")[0] not in self.denoisers:
            raise InputError(
                f"A standalone script changes the output or input of a denoiser's module, not {spelled}. "
                f"{_ELSE}"
            )
        return site.path, site.port, self._leaf(site)

    def _leaf(self, site: Site) -> Leaf:
        """Return where in the value the tensor is, spelled out also where the site leaves it to us."""
        if site.leaf or str(site) not in self.source.captured:
            return site.leaf
        found = list(leaves(self.source.passages(site)[0].value))
        return found[0][0] if len(found) == 1 else ()

    def _calls(self, change: SiteChange) -> dict[int, list[tuple[int, int]]]:
        """Return for each call the rows that are changed, as (branch, of branches)."""
        chosen, found = change.act(self.steps), {}
        for row in self.target.ledger:
            branches = [each for each in row.branches if change.branch in (ALL, "both", each)]
            if row.step in chosen and branches:
                found[row.call] = [(row.branches.index(each), len(row.branches)) for each in branches]
        return found

    def _given(self, change: Any, run: Record | None = None) -> dict[int, list[tuple[int, int, int]]]:
        """Return for each call, and each of its rows, the call of another run and the rows there."""
        source, early = run or self.source, getattr(change, "from_step", None)
        found = {}
        for call, rows in self._calls(change).items():
            row, given = self.target.ledger[call], []
            for index, _ in rows:
                branch = row.branches[index]
                if early is None:
                    nth = [each.call for each in self.target.ledger.at(row.step, branch)].index(call)
                    other: Row = source.ledger.at(row.step, branch)[nth]
                else:
                    other = source.ledger.at(early, branch)[0]
                given.append((other.call, other.branches.index(branch), len(other.branches)))
            found[call] = given
        return found

    def _seen(self, change: SteerSpec) -> list[tuple[int, int, int]]:
        """Return the call of each step that a direction is looked for in, and its rows."""
        found = []
        for step in sorted(change.act(self.steps)):
            row = self.target.ledger.at(step, change.branch)[0]
            if change.branch in (ALL, "both"):
                found.append((row.call, 0, 1))
            else:
                found.append((row.call, row.branches.index(change.branch), len(row.branches)))
        return found

    def _tokens(self, change: SiteChange) -> list[int]:
        if change.tokens is not None:
            return list(change.tokens)
        assert change.words is not None
        return list(self.experiment.places(self.target, change.words)(self._length(change.site)))

    def _from_tokens(self, change: PatchSpec) -> list[int] | None:
        if change.from_tokens is not None:
            return list(change.from_tokens)
        words = change.words if change.from_words is None else change.from_words
        if words is None:
            return None
        length = self.source.passages(change.captures[0])[0].value.shape[1]
        return list(self.experiment.places(self.source, words)(length))

    def _length(self, site: str) -> int:
        """Return how long the sequence at a site is, from a call of its own if no run kept it."""
        for run in (self.source, self.target):
            if site in run.captured:
                return int(run.passages(site)[0].value.shape[1])
        last = self.target.fork(self.steps - 1, capture=[site], interventions=[])
        return int(last.passages(site)[-1].value.shape[1])


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


def _constants(experiment: Experiment) -> str:
    lines = [
        f"MODEL = {_model_code(experiment)}",
        f"REVISION = {experiment.revision!r}",
        f"SOURCE = {_run_of(experiment.source, experiment.source_seed, experiment.seed)!r}",
        f"TARGET = {_run_of(experiment.target, None, experiment.seed)!r}",
        f"SETTINGS = {experiment.settings()!r}",
        f"THREADS = {torch.get_num_threads()}  # as in the run: on a CPU the last bits depend on it",
    ]
    return "\n".join(lines)


def _run_of(prompt: str | None, own_seed: int | None, seed: int) -> dict[str, Any]:
    words = {} if prompt is None else {"prompt": prompt}
    return {**words, "seed": seed if own_seed is None else own_seed}


_HEAD = '''
"""An experiment on a diffusion model, exported by Diffusion Workbench.

Needs diffusers and torch alone. Run it: python SCRIPT [--model FOLDER_OR_HUB_ID] [--out IMAGE.png]
"""

import argparse
import functools

import torch
from diffusers import DiffusionPipeline
'''

_OPEN = '''
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=MODEL, help="folder or Hub id of the pipeline")
parser.add_argument("--out", default="patched.png", help="where the image goes")
options = parser.parse_args()

torch.set_num_threads(THREADS)
pipeline = DiffusionPipeline.from_pretrained(options.model, revision=REVISION)


def generate(seed, settings=SETTINGS, **words):
    """Run the pipeline with the experiment's settings and noise."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(**words, generator=generator, **settings).images[0]
'''

_PLAIN = """
generate(**TARGET).save(options.out)
"""

_MACHINE = '''
class Clock:
    """Counts the calls of the denoiser and of the scheduler in one run."""

    call = None
    calls = 0
    ticks = 0

    def enter(self, module, inputs):
        self.call = self.calls
        self.calls += 1

    def leave(self, module, inputs, output):
        self.call = None


kept = {}  # what runs leave for later ones, by run, place and call
outputs, predictions = [], []  # of the last run: what the denoiser returned, and what the scheduler was given


def pick(value, leaf):
    """Return the part of a module's value that a change is about; of several, the only tensor."""
    for key in leaf:
        value = value[key]
    if not isinstance(value, torch.Tensor):
        value = next(each for each in (value.values() if isinstance(value, dict) else value))
    return value


def put(value, leaf, new):
    """Return the value with that part replaced."""
    if not leaf and isinstance(value, torch.Tensor):
        return new
    key = leaf[0] if leaf else next(iter(value)) if isinstance(value, dict) else 0
    changed = put(value[key], leaf[1:], new)
    if isinstance(value, (tuple, list)):
        return type(value)(changed if i == key else each for i, each in enumerate(value))
    return type(value)(**{**value, key: changed})


def rows(tensor, index, count):
    """Return one guidance branch's rows of a batch that holds several, one after the other."""
    width = tensor.shape[0] // count
    return tensor[index * width : (index + 1) * width]


def spread(mask, value):
    """Return a mask of the picture at the size of a value: (batch, channels, rows, columns) or in a row."""
    mask = torch.tensor(mask)
    if value.ndim == 3:
        height = max(round((value.shape[1] * mask.shape[0] / mask.shape[1]) ** 0.5), 1)
        height = next(h for h in (height, height - 1, height + 1) if h > 0 and value.shape[1] % h == 0)
        shape = (height, value.shape[1] // height)
    else:
        shape = tuple(value.shape[-2:])
    if tuple(mask.shape) != shape:
        mask = torch.nn.functional.interpolate(
            mask[None, None], size=shape, mode="bilinear", align_corners=False
        )[0, 0]
    return mask.flatten()[:, None].to(value) if value.ndim == 3 else mask.to(value)


def places(change, name="tokens"):
    """Return the index of what is changed in one branch's rows."""
    return (slice(None), change[name]) if name in change else (slice(None),)


@functools.cache
def direction(number):
    """Return the direction of a steering: from the second to the first of each pair of prompts."""
    change = CHANGES[number]
    seen = []
    for run in change["runs"]:
        values = [
            rows(kept[(run, *change["from"], call)], index, count)[places(change)].mean(0)
            for call, index, count in change["seen"]
        ]
        seen.append(torch.stack(values).float())
    differences = torch.stack([one - other for one, other in zip(seen[::2], seen[1::2])])
    mean = differences.mean((0, 1))
    if change["method"] == "pca":
        first = torch.linalg.svd(differences.flatten(0, 1).flatten(1), full_matrices=False).Vh[0]
        mean = ((mean.flatten() @ first) * first).reshape(mean.shape)
    return mean


def taken(change, run, given, value):
    """Return what another run has for these rows."""
    call, index, count = given
    found = rows(kept[(run, *change["from"], call)], index, count)
    found = found[places(change, "from_tokens" if "from_tokens" in change else "tokens")]
    return found.expand_as(value).to(value)


def new_value(change, call, number, value):
    """Return what a change makes of one branch's rows."""
    if change["do"] == "scale":
        return value * change["factor"]
    if change["do"] == "zero":
        return torch.zeros_like(value)
    if change["do"] == "noise":
        generator = torch.Generator("cpu").manual_seed(change["seed"] * 1_000_003 + call)
        noise = torch.randn(value.shape, generator=generator).to(value)
        over = tuple(range(1, value.ndim))
        return value.mean(over, keepdim=True) + noise * value.std(over, keepdim=True)
    if change["do"] == "steer":
        return value + direction(CHANGES.index(change)).to(value)
    given = change["given"][call][number]
    found = [taken(change, run, given, value) for run in change["runs"]]
    return torch.stack(found).mean(0) if change["do"] == "mean" else found[0]


def apply(change, call, value):
    """Make a change, if the call is one of its own."""
    if call not in change["calls"]:
        return value
    leaf = change["at"][2]
    changed = pick(value, leaf).clone()
    for number, (index, count) in enumerate(change["calls"][call]):
        part = rows(changed, index, count)
        if "tokens" in change:
            new = part.clone()
            new[places(change)] = new_value(change, call, number, part[places(change)])
        else:
            new = new_value(change, call, number, part)
        if "strength" in change:
            new = part + change["strength"] * (new - part)
        if "mask" in change:
            share = spread(change["mask"], part)
            new = torch.where(share == 1, new, part + share * (new - part))
        part[:] = new
    return put(value, leaf, changed)


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


def module_at(path):
    """Return a module of the pipeline by its path."""
    name, _, rest = path.partition(".")
    return getattr(pipeline, name).get_submodule(rest)


def run(which, settings=SETTINGS, keeps=None, changes=(), again=(0, 0)):
    """Run the pipeline once.

    Keeps what later changes take from the run named ``keeps``, makes the ``changes``, and up to the calls in
    ``again`` (of the denoiser, of the scheduler) repeats the run before it.
    """
    clock, hooks = Clock(), []
    before, given = list(outputs), list(predictions)
    outputs.clear()
    predictions.clear()
    step = pipeline.scheduler.step

    def returned(value):
        value = before[clock.call] if clock.call < again[0] else value
        outputs.append(value)
        return value

    @functools.wraps(step)
    def stepped(prediction, *rest, **named):
        prediction = given[clock.ticks] if clock.ticks < again[1] else prediction
        clock.ticks += 1
        predictions.append(prediction)
        return step(prediction, *rest, **named)

    denoisers = [getattr(pipeline, name) for name in DENOISERS]
    hooks += [each.register_forward_pre_hook(clock.enter) for each in denoisers]
    for change in CHANGES:
        if keeps in change.get("runs", ()):
            path, port, leaf = change["from"]

            def keep(value, key=(keeps, path, port, leaf), leaf=leaf):
                if clock.call is not None:
                    kept[(*key, clock.call)] = pick(value, leaf).clone()
                return value

            hooks.append(hook(module_at(path), port, keep))
    for change in changes:
        path, port, _ = change["at"]
        hooks.append(
            hook(module_at(path), port, lambda value, change=change: apply(change, clock.call, value))
        )
    hooks += [each.register_forward_hook(lambda m, i, output: returned(output)) for each in denoisers]
    hooks += [each.register_forward_hook(clock.leave) for each in denoisers]
    pipeline.scheduler.step = stepped
    try:
        return generate(settings=settings, **which)
    finally:
        del pipeline.scheduler.step
        for each in hooks:
            each.remove()
'''
