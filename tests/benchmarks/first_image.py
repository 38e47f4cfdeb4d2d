"""Time and memory from nothing to the first image, each in a fresh process."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from tests.benchmarks import beside
from tests.benchmarks.processes import fresh
from tests.benchmarks.table import PROMPT, Row, Setting
from workbench.models.loading import locate

_BARE = """
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({folder!r})
pipeline({prompt!r}, num_inference_steps={steps})
"""
_OURS = """
import workbench as wb
model = wb.DiffusionModel({folder!r})
model.record({prompt!r}, num_inference_steps={steps}, seed=0)
"""
_NNSIGHT = """
from nnsight import DiffusionModel
model = DiffusionModel({folder!r}, dispatch=True)
model.pipeline({prompt!r}, num_inference_steps={steps})
"""


def rows(setting: Setting) -> Iterator[Row]:
    """Yield seconds and MiB to the first image: the bare pipeline's, ours, nnsight's."""
    programs = {"bare": _BARE, "ours": _OURS} | ({"nnsight": _NNSIGHT} if beside.THERE else {})
    places = {"folder": locate(setting.model), "prompt": PROMPT, "steps": setting.steps}
    measured = {name: [fresh(text.format(**places)) for _ in range(3)] for name, text in programs.items()}
    for name, what in (("bare", "bare pipeline"), ("ours", "workbench")):
        yield Row(
            f"start to first image, {what}",
            spell(measured[name]),
            spell(measured.get("nnsight")) if name == "ours" else "",
        )
    yield Row(
        "import workbench",
        f"{1000 * median(fresh('import workbench')[0] - fresh('')[0] for _ in range(5)):.0f} ms",
    )


def spell(measured: list[tuple[float, int]] | None) -> str:
    """Spell the median seconds and peak memory."""
    if measured is None:
        return ""
    seconds, peak = (median(each) for each in zip(*measured, strict=True))
    return f"{seconds:.1f} s, {peak / 1024:.0f} MiB peak"
