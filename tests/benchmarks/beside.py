"""The same runs in nnsight, where it is installed: it parses the block's source, so each is written out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.benchmarks import table
from tests.benchmarks.table import OTHER, PROMPT, Setting

try:
    THERE = importlib.util.find_spec("nnsight") is not None
except ValueError:
    THERE = False


def ratio(seconds: Mapping[str, Sequence[float]], name: str, beside: str) -> str:
    """Spell a ratio, or nothing where it was not measured."""
    return table.ratio(seconds, name, beside) if name in seconds else ""


def overhead(setting: Setting) -> dict[str, Callable[[], Any]]:
    """Return nnsight's runs of what `overhead` times, by name."""
    if not THERE:
        return {}
    model = load(setting.model)
    steps = setting.steps
    from tests.benchmarks.overhead import called_once
    from workbench.tracing.sites import modules

    pipeline = model.pipeline
    paths = [path for path in modules({"unet": pipeline.unet}) if path != "unet"]
    called = [model.get(path) for path in called_once(pipeline, paths)]

    def bare() -> None:
        import torch

        pipeline(PROMPT, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0))

    def idle() -> None:
        with model.generate(PROMPT, num_inference_steps=steps, seed=0):
            pass

    def one() -> None:
        with model.generate(PROMPT, num_inference_steps=steps, seed=0) as tracer:
            kept = list().save()  # noqa: C408 - nnsight's way to keep a list
            for _ in tracer.iter[:]:
                kept.append(model.unet.mid_block.output)

    def all_of_them() -> None:
        with model.generate(PROMPT, num_inference_steps=steps, seed=0) as tracer:
            for _ in tracer.iter[:]:
                for envoy in called:
                    envoy.output  # noqa: B018 - a read is what is timed

    def cached() -> None:
        with model.generate(PROMPT, num_inference_steps=steps, seed=0) as tracer:
            tracer.cache(modules=called).save()

    return {
        "nnsight: bare": bare,
        "nnsight: idle trace": idle,
        "nnsight: one site at each step": one,
        "nnsight: every module's output": all_of_them,
        "nnsight: every module's output, cached": cached,
    }


def patching(setting: Setting) -> Callable[[], Any] | None:
    """Return nnsight's way to a patched image: the whole run, patched from half of its steps on."""
    if not THERE:
        return None
    model = load(setting.model)
    steps, half = setting.steps, setting.steps // 2
    kept = _activations(model, steps)

    def patched() -> Any:
        with model.generate(PROMPT, num_inference_steps=steps, seed=0) as tracer:
            for step in tracer.iter[half:steps]:
                model.unet.mid_block.output = kept[step]
            images = model.output.save()
        return images  # noqa: RET504 - saved inside the block, read after it

    return patched


def _activations(model: Any, steps: int) -> Any:
    with model.generate(OTHER, num_inference_steps=steps, seed=0) as tracer:
        kept = list().save()  # noqa: C408
        for _ in tracer.iter[:]:
            kept.append(model.unet.mid_block.output)
    return kept


def load(model: str) -> Any:
    """Open a model in nnsight."""
    from nnsight import DiffusionModel

    from workbench.models.loading import locate

    opened = DiffusionModel(locate(model), dispatch=True)
    opened.pipeline.set_progress_bar_config(disable=True)
    return opened
