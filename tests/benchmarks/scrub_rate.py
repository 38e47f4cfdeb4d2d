"""How smoothly the scrubber goes through a run's steps, in a real browser."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.table import PROMPT, Row, Setting
from workbench import DiffusionModel


def rows(setting: Setting) -> Iterator[Row]:
    """Yield frames a second, where there are playwright and Chromium."""
    try:
        from tests.benchmarks.scrubbing import frames_per_second
    except ImportError:
        return
    model = DiffusionModel(setting.model)
    model.pipeline.set_progress_bar_config(disable=True)
    record = model.record(PROMPT, seed=0, num_inference_steps=setting.steps)
    with tempfile.TemporaryDirectory() as folder:
        measured = frames_per_second(record, Path(folder) / "run.html")
    if measured is not None:
        yield Row("scrubbing, a new step every frame", f"{measured:.0f} frames a second (at most 60)")
