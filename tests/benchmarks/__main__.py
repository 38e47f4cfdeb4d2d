"""Measures the workbench against the bare pipeline: ``python -m tests.benchmarks``.

Ratios come from one process, in which the variants take turns; the median of the rounds is printed.
Nothing here asserts: a machine has its own speed.
"""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.benchmarks import (
    attention,
    attribution,
    first_image,
    gradients,
    overhead,
    patching,
    scrub_rate,
    sweeping,
    trees,
)
from tests.benchmarks.table import Row, Setting, as_text, page, section

README = Path(__file__).parent / "README.md"


SECTIONS = {
    "Looking": overhead.rows,
    "Patching": patching.rows,
    "Derivatives": gradients.rows,
    "Experiments": sweeping.rows,
    "Attribution": attribution.rows,
    "Attention": attention.rows,
    "Starting": first_image.rows,
    "Component trees": trees.rows,
    "Scrubbing": scrub_rate.rows,
}
"""What is measured, by the section of the page."""


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--model", default="shapes-unet", help="a zoo name or a folder")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps a run")
    parser.add_argument("--rounds", type=int, default=30, help="rounds the medians are of")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="which sections")
    parser.add_argument("--write", action="store_true", help=f"also write {README.name}")
    given = parser.parse_args()
    setting = Setting(given.model, given.steps, given.rounds)

    warnings.filterwarnings("ignore")
    for name in given.only:
        where = machine()
        rows = list(measure(SECTIONS[name], setting))
        print(f"\n{name}: {where}\n\n{as_text(rows)}\n")
        if given.write:
            before = README.read_text() if README.exists() else ""
            README.write_text(page({name: section(name, rows, setting, where)}, before))


def measure(benchmark: Callable[[Setting], Iterator[Row]], setting: Setting) -> Iterator[Row]:
    """Yield every row of a section, saying which as it comes."""
    for row in benchmark(setting):
        print(f"{row.what}: {row.value}", flush=True)
        yield row


def machine() -> str:
    """Describe what this runs on: date, processor, cores, memory, load and versions; no names."""
    cores = os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    busy = f", with a load of {load:.1f} beside" if load > 0.5 else ""
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, {cores} cores, {memory:.0f} GiB, "
        f"torch {torch.__version__.partition('+')[0]} on {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}{busy}"
    )


if __name__ == "__main__":
    main()
