"""Every promise of the tracer on every family of pipelines, and the table that says so.

``python -m tests.tracing.matrix --write`` runs all of them and writes the table into README.md beside
this file; without ``--write`` it prints the table. `test_matrix.py` holds the table to what it finds.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests import tiny
from tests.watching import Clocks, as_bytes, clocks_of, footprint, forwards_of
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.models.outline import outline
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.structure import leaves

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- matrix -->", "<!-- end of matrix -->"

Bytes = tuple[list[Any], Any, Any]
"""A run, as bytes: the latents of every tick, the output, the state of torch's generator after."""


class Subject:
    """A tiny pipeline, its bare run and its record: made once, looked at by every promise."""

    def __init__(self, name: str, case: tiny.Case | None = None) -> None:
        self.name = name
        self.case = case or tiny.FAMILIES[name]
        self.pipeline = self.case.build()
        self.model = DiffusionModel(self.pipeline)
        self.clocks, self.bare = self._bare()
        self.footprint = footprint(self.pipeline)

    @cached_property
    def watched(self) -> tuple[Bytes, Record]:
        """A run with every module captured."""
        parts = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        every = [path for name, part in parts.items() for path, _ in part.named_modules(prefix=name)]
        return self.recorded(capture=[*every, f"{self.case.site}:input"])

    @property
    def record(self) -> Record:
        """The record of `watched`."""
        return self.watched[1]

    @cached_property
    def other(self) -> Record:
        """A run that makes something else: from other words, another class, or else other noise."""
        change: dict[str, Any] = {"seed": 3}
        if "prompt" in self.case.arguments:
            change = {"prompt": "a blue square"}
        if "class_labels" in self.case.arguments:
            change = {"class_labels": [7]}
        return self.recorded(**change, capture=[self.case.site])[1]

    @property
    def rows(self) -> list[Row]:
        """The calls of the denoiser that the case's site is in."""
        return [row for row in self.record.ledger if self.has_site(row)]

    def has_site(self, row: Row) -> bool:
        """Whether the case's site is passed in a call."""
        return self.case.site.startswith(row.component + ".")

    def recorded(self, **asked: Any) -> tuple[Bytes, Record]:
        """Record a run of the case and watch it from outside."""
        torch.manual_seed(11)
        with clocks_of(self.pipeline) as clocks:
            record = self.model.record(**{**self.case.arguments, "seed": 0, **asked})
        return (clocks.latents, as_bytes(dict(record.output)), as_bytes(torch.get_rng_state())), record

    def in_block(self, block: Callable[[Any], None]) -> tuple[Bytes, Any]:
        """Run the case in a ``with`` block, and watch it from outside."""
        torch.manual_seed(11)
        with clocks_of(self.pipeline) as clocks, self.model.generate(**self.case.arguments, seed=0) as run:
            block(run)
        return (clocks.latents, as_bytes(dict(run.output)), as_bytes(torch.get_rng_state())), run

    def _bare(self) -> tuple[Clocks, Bytes]:
        generator = torch.Generator("cpu").manual_seed(0)
        torch.manual_seed(11)
        with clocks_of(self.pipeline) as clocks:
            output = self.pipeline(**self.case.arguments, generator=generator)
        return clocks, (clocks.latents, as_bytes(dict(output)), as_bytes(torch.get_rng_state()))


def tree(subject: Subject) -> None:
    """The outline has every component and every module, each after its parent."""
    nodes = outline(subject.model)
    parts = {name: part for name, part in subject.pipeline.components.items() if part is not None}
    expected = [
        path
        for name, part in parts.items()
        for path in (dict(part.named_modules(prefix=name)) if isinstance(part, nn.Module) else [name])
    ]
    assert [node.path for node in nodes] == expected
    for node in nodes:
        if node.kind == "component":
            assert node.parameters == sum(each.numel() for each in parts[node.path].parameters())


def ledger(subject: Subject) -> None:
    """Calls, ticks, steps and timesteps are those of the pipeline's own clocks."""
    found, clocks = subject.record.ledger, subject.clocks
    assert [(row.component, row.tick, row.step) for row in found] == clocks.calls
    assert (found.ticks, found.steps) == (clocks.ticks, clocks.steps)
    assert [row.timestep for row in found] == [clocks.timesteps[tick] for _, tick, _ in clocks.calls]


def branches(subject: Subject) -> None:
    """The words, or the class, change what is computed for ``cond`` and nothing of ``uncond``."""
    for row in subject.record.ledger.at(0):
        (_, one), *_ = leaves(subject.record.calls[row.call])
        (_, other), *_ = leaves(subject.other.calls[row.call])
        for branch in row.branches:
            changed = [as_bytes(a) != as_bytes(b) for a, b in zip(one, other, strict=True)]
            assert set(changed[row.rows(branch, len(one))]) == {branch in WORDED}


def read(subject: Subject) -> None:
    """A ``with`` block reads, call by call, what a recorded run keeps; and changes nothing."""
    values = []

    def block(run: Any) -> None:
        for row in run.calls:
            if subject.has_site(row):
                values.append(as_bytes(subject.model.site(subject.case.site).output))

    after, _ = subject.in_block(block)
    assert values == [as_bytes(each.value) for each in subject.record.passages(subject.case.site)]
    assert len(values) == len(subject.rows) > 0
    assert after == subject.bare


def replace(subject: Subject) -> None:
    """A value put in place of another shows from its tick on, and not before."""
    target = subject.rows[len(subject.rows) // 2]

    def block(run: Any) -> None:
        for row in run.calls:
            if row.call == target.call:
                value = subject.model.site(subject.case.site).output
                subject.model.site(subject.case.site).output = value.flip(-1)

    after, _ = subject.in_block(block)
    assert after[0][: target.tick] == subject.bare[0][: target.tick]
    assert after[0][target.tick] != subject.bare[0][target.tick]
    assert after[1] != subject.bare[1]


def zero(subject: Subject) -> None:
    """A denoiser whose output is zeroed predicts zero, and the result is another.

    Where a pipeline divides by the prediction's norm, as Qwen-Image does, zero becomes NaN.
    """

    def block(run: Any) -> None:
        for row in run.calls:
            for _, value in leaves(subject.model.site(row.component).output):
                value.zero_()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)
        after, run = subject.in_block(block)
    assert not any(tick["noise_pred"].nan_to_num().any() for tick in run.record.ticks)
    assert after[1] != subject.bare[1]


def looking(subject: Subject) -> None:
    """A run with every module captured is the bare one: latents, output and the state of the generator."""
    assert subject.watched[0] == subject.bare
    assert [as_bytes(tick["latents"]) for tick in subject.record.ticks] == subject.bare[0]


def patch(subject: Subject) -> None:
    """Patched with its own activations a run is the bare one; patched with another's it is not."""
    site = subject.case.site
    own = [Patch(f"{site}:{port}", source=subject.record) for port in ("input", "output")]
    assert subject.recorded(interventions=own)[0] == subject.bare
    changed, _ = subject.recorded(interventions=[Patch(site, source=subject.other)])
    # The latents: a change too small for the bytes of the picture is a change.
    assert changed[0] != subject.bare[0]


def fork(subject: Subject) -> None:
    """A fork in the middle, and one at the last step, are the whole run, and compute what is left of it."""
    whole, site = subject.record, subject.case.site
    for step in {whole.ledger.steps // 2, whole.ledger.steps - 1}:
        with ExitStack() as stack:
            forwards = [stack.enter_context(forwards_of(each)) for each in subject.model.denoisers.values()]
            forked = whole.fork(step, capture=[site])
        assert [as_bytes(tick["latents"]) for tick in forked.ticks] == subject.bare[0]
        assert as_bytes(dict(forked.output)) == subject.bare[1]
        assert forked.ledger == whole.ledger
        assert as_bytes([each.value for each in forked.passages(site)]) == as_bytes(
            [each.value for each in whole.passages(site)]
        )
        assert sum(map(len, forwards)) == sum(row.step >= step for row in whole.ledger)


def tidy(subject: Subject) -> None:
    """After runs that end, runs that fail and blocks that are left, the pipeline is as it was."""

    def broken(run: Any) -> None:
        for row in run.calls:
            if subject.has_site(row):
                subject.model.site(subject.case.site).output.mul_(0.5)
                raise Interrupted

    subject.record.fork(1)
    for failing in (lambda: subject.recorded(listener=Failing()), lambda: subject.in_block(broken)):
        try:
            failing()
        except Interrupted:
            pass
        else:
            raise AssertionError("the run should not have ended well")
    assert footprint(subject.pipeline) == subject.footprint


WORDED = ("cond", "perturbed")
"""The branches that have the words."""


class Interrupted(Exception):
    """Ends a run."""


class Failing:
    """A listener that ends the run in its second step."""

    def started(self, row: Row) -> None:
        if row.step == 1:
            raise Interrupted

    def ticked(self, tick: Any, latents: torch.Tensor) -> None:
        pass


PROMISES: dict[str, Callable[[Subject], None]] = {
    each.__name__: each for each in (tree, ledger, branches, read, replace, zero, looking, patch, fork, tidy)
}

EXCEPTIONS: dict[tuple[str, str], str] = {
    ("sd1-pag", "tidy"): "a run that fails leaves the pipeline's own perturbing processors, as without us"
}
"""Why a family does not keep a promise, by both their names; an entry that is not needed fails a test."""


def facts(subject: Subject) -> list[str]:
    """Return what the table says of a family beside its promises."""
    clocks = subject.clocks
    named = ", ".join(dict.fromkeys(row.branch for row in subject.record.ledger))
    kind = f"`{type(subject.pipeline).__name__}`"
    return [subject.name, kind, f"{clocks.steps} / {clocks.ticks} / {len(clocks.calls)}", named]


def mark(subject: Subject, promise: str) -> str:
    """Return what the table says of a family and a promise."""
    if (subject.name, promise) in EXCEPTIONS:
        return f"no: {EXCEPTIONS[subject.name, promise]}"
    try:
        PROMISES[promise](subject)
    except AssertionError:
        return "**broken**"
    return "✓"


def line(cells: list[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def cells(line: str) -> list[str]:
    """Return the cells of a row of a Markdown table."""
    return [each.strip() for each in line.strip().strip("|").split("|")]


def head() -> list[str]:
    """Return the first two lines of the table."""
    names = ["family", "pipeline", "steps / ticks / calls", "a call computes", *PROMISES]
    return [line(names), line(["---"] * len(names))]


def table() -> str:
    """Return the whole table, run anew."""
    subjects = (Subject(name) for name in tiny.FAMILIES)
    rows = (line([*facts(each), *(mark(each, promise) for promise in PROMISES)]) for each in subjects)
    return "\n".join([*head(), *rows])


def written() -> list[str]:
    """Return the lines of the table in README.md."""
    return README.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()


def write(text: str) -> None:
    """Put a table into README.md in place of the one that is there."""
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.tracing.matrix")
    parser.add_argument("--write", action="store_true", help="write the table into README.md")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    found = table()
    if asked.write:
        write(found)
    else:
        print(found)


if __name__ == "__main__":
    main()
