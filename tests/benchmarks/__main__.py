"""Measures the workbench against the bare pipeline: ``python -m tests.benchmarks``.

Ratios come from one process, in which the variants take turns; the median of the rounds is printed.
Nothing here asserts: a machine has its own speed.
"""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from tests.benchmarks import attention, first_image, gradients, overhead, patching, scrub_rate, trees
from tests.benchmarks.table import Row, Setting, as_markdown, as_text

README = Path(__file__).parent / "README.md"


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--model", default="shapes-unet", help="a zoo name or a folder")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps a run")
    parser.add_argument("--rounds", type=int, default=30, help="rounds the medians are of")
    parser.add_argument("--write", action="store_true", help=f"also write {README.name}")
    given = parser.parse_args()
    setting = Setting(given.model, given.steps, given.rounds)

    warnings.filterwarnings("ignore")
    where = machine()
    rows = list(measure(setting))
    print(f"\n{where}\n\n{as_text(rows)}")
    if given.write:
        README.write_text(as_markdown(rows, setting, where))


def measure(setting: Setting) -> Iterator[Row]:
    """Yield every row, saying which as it comes."""
    for benchmark in (
        overhead.rows,
        patching.rows,
        gradients.rows,
        attention.rows,
        first_image.rows,
        trees.rows,
        scrub_rate.rows,
    ):
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
