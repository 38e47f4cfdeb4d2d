"""What is measured, and how it is printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

PROMPT = "a large red circle and a small blue square on a dark background"
OTHER = "a large green cross and a small blue square on a dark background"


@dataclass(frozen=True)
class Setting:
    """What every benchmark is run with."""

    model: str
    steps: int
    rounds: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    value: str
    nnsight: str = ""


def take_turns(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time each variant once a round, another first each round; return seconds by variant."""
    for run in variants.values():
        run()
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in [*names[first:], *names[:first]]:
            began = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, Sequence[float]], name: str, beside: str) -> str:
    """Spell the median over the rounds of one variant's time over another's, with its 95% interval.

    The interval is a bootstrap's (Efron, 1979), of 4,000 resamples of the rounds.
    """
    each = np.array([one / other for one, other in zip(seconds[name], seconds[beside], strict=True)])
    resampled = np.random.default_rng(0).choice(each, (4_000, len(each)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    return f"× {np.median(each):.3f} ({low:.3f} to {high:.3f})"


def bounded(seconds: Mapping[str, Sequence[float]], name: str, beside: str, bound: float, why: str) -> str:
    """Spell a ratio beside its bound; one that misses it says by how much, and why."""
    missed = median([one / other for one, other in zip(seconds[name], seconds[beside], strict=True)]) - bound
    told = ratio(seconds, name, beside)
    return f"{told}, {missed:.3f} above the bound: {why}" if missed > 0 else told


def milliseconds(seconds: Sequence[float]) -> str:
    """Spell a median time."""
    return f"{1000 * median(seconds):.0f} ms"


def as_text(rows: Sequence[Row]) -> str:
    """Spell the table for a terminal."""
    wide, value = (max(len(getattr(row, name)) for row in rows) for name in ("what", "value"))
    head = f"{'':<{wide}}  {'workbench':<{value}}  nnsight"
    return "\n".join([head, *(f"{row.what:<{wide}}  {row.value:<{value}}  {row.nnsight}" for row in rows)])


_HEAD = """# Benchmarks

`make bench` prints them; `python -m tests.benchmarks --write` writes this page, with `--only` some sections.
Ratios are to the bare pipeline in the same process, or to what the row says ("of …"), the variants taking
turns: the median of the rounds, with its 95% bootstrap interval. nnsight does the same where it is installed.
A bound is what is aimed at; a row above its own misses it.
"""


def page(sections: Mapping[str, str], before: str) -> str:
    """Return the README of the benchmarks, with the sections that were not measured now as they were."""
    kept = dict(part.split("\n", 1) for part in before.split("\n## ")[1:])
    found = {**{name: f"## {name}\n{text.rstrip()}\n" for name, text in kept.items()}, **sections}
    return "\n".join([_HEAD, *found.values()])


def section(name: str, rows: Sequence[Row], setting: Setting, machine: str) -> str:
    """Spell a table for the README of the benchmarks."""
    return "\n".join(
        [
            f"## {name}",
            "",
            f"{machine}. {setting.model}, {setting.steps} steps with guidance, {setting.rounds} rounds.",
            "",
            "| | workbench | nnsight |",
            "|---|---|---|",
            *(f"| {row.what} | {row.value} | {row.nnsight} |" for row in rows),
            "",
        ]
    )
