"""What looking costs: a run with a trace, as a multiple of the bare pipeline's time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests import tiny
from tests.benchmarks import beside
from tests.benchmarks.table import PROMPT, Row, Setting, bounded, milliseconds, ratio, take_turns
from workbench import DiffusionModel
from workbench.tracing.sites import modules
from workbench.tracing.structure import leaves

SITE = "unet.mid_block"
CACHE = "nnsight: every module's output, cached"
BOUNDS = {"idle trace": 1.01, "one site at each step": 1.02}


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the rows of the model, then those of a tiny pipeline, whose calls are nearly all Python."""
    yield from _rows(setting)
    with TemporaryDirectory() as folder:
        tiny.sd1().save_pretrained(folder)
        for row in _rows(replace(setting, model=folder)):
            yield replace(row, what=f"tiny pipeline: {row.what}")


def _rows(setting: Setting) -> Iterator[Row]:
    """Yield the bare pipeline's time and the ratios to it."""
    model = DiffusionModel(setting.model)
    seconds = take_turns(variants(model, setting) | beside.overhead(setting), setting.rounds)
    yield Row(
        "bare pipeline, one image",
        milliseconds(seconds["bare"]),
        milliseconds(seconds["nnsight: bare"]) if "nnsight: bare" in seconds else "",
    )
    own = f"what any run is watched for is {ratio(seconds, 'nothing kept', 'bare')} of the bare one"
    for name, bound in BOUNDS.items():
        yield Row(
            f"{name} (bound {bound})",
            bounded(seconds, name, "bare", bound, own),
            beside.ratio(seconds, f"nnsight: {name}", "nnsight: bare"),
        )
    name = "every module's output"
    yield Row(name, ratio(seconds, name, "bare"), beside.ratio(seconds, f"nnsight: {name}", "nnsight: bare"))
    yield Row("a record without captures", ratio(seconds, "nothing kept", "bare"))
    yield Row("one site at each step, kept", ratio(seconds, "one site, kept", "bare"))
    name = f"every module's output, kept ({mebibytes(model, setting):.0f} MiB)"
    yield Row(name, ratio(seconds, "all sites, kept", "bare"), beside.ratio(seconds, CACHE, "nnsight: bare"))
    yield Row(
        "… of raw hooks that copy the same (bound 1.05)",
        bounded(seconds, "all sites, kept", "raw hooks", 1.05, own),
    )
    if CACHE in seconds:
        # It holds references: an edit in place would change what it has.
        copies = f"raw hooks that copy are {ratio(seconds, 'raw hooks', CACHE)} of it by themselves"
        yield Row(
            "… of nnsight's cache, which copies nothing (bound 0.85)",
            bounded(seconds, "all sites, kept", CACHE, 0.85, copies),
        )


def mebibytes(model: DiffusionModel, setting: Setting) -> float:
    """Return how much a record of every module's output holds."""
    pipeline = model.pipeline
    called = called_once(pipeline, [path for path in modules({"unet": pipeline.unet}) if path != "unet"])
    record = model.record(PROMPT, capture=called, num_inference_steps=1)
    kept = [
        tensor for values in record.captured.values() for each in values for _, tensor in leaves(each.value)
    ]
    return setting.steps * sum(tensor.nbytes for tensor in kept) / 2**20


def variants(model: DiffusionModel, setting: Setting) -> dict[str, Callable[[], Any]]:
    """Return the runs to time, by name."""
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"num_inference_steps": setting.steps, "seed": 0}
    every = [path for path in modules({"unet": pipeline.unet}) if path != "unet"]
    called = called_once(pipeline, every)

    def bare() -> None:
        generator = torch.Generator("cpu").manual_seed(0)
        pipeline(PROMPT, num_inference_steps=setting.steps, generator=generator)

    def idle() -> None:
        with model.generate(PROMPT, **asked):
            pass

    def one() -> None:
        with model.generate(PROMPT, **asked) as run:
            for _ in run.steps:
                model.unet.mid_block.output.save()

    def all_of_them() -> None:
        proxies = [model.site(path) for path in called]
        with model.generate(PROMPT, **asked) as run:
            for _ in run.steps:
                for proxy in proxies:
                    getattr(proxy, "output")  # noqa: B009 - a read is what is timed

    def raw() -> None:
        kept: dict[str, list[Any]] = {path: [] for path in called}
        handles = [
            pipeline.unet.get_submodule(path.removeprefix("unet.")).register_forward_hook(
                lambda _module, _args, output, path=path: kept[path].append(copied(output))
            )
            for path in called
        ]
        bare()
        for handle in handles:
            handle.remove()

    return {
        "bare": bare,
        "idle trace": idle,
        "one site at each step": one,
        "every module's output": all_of_them,
        "nothing kept": lambda: model.record(PROMPT, **asked),
        "one site, kept": lambda: model.record(PROMPT, capture=[SITE], **asked),
        "all sites, kept": lambda: model.record(PROMPT, capture=called, **asked),
        "raw hooks": raw,
    }


def copied(output: Any) -> Any:
    """Return what a hook written by hand would keep."""
    if isinstance(output, torch.Tensor):
        return output.detach().clone()
    if isinstance(output, dict):
        return {name: copied(each) for name, each in output.items()}
    return tuple(copied(each) for each in output)


def called_once(pipeline: Any, paths: list[str]) -> list[str]:
    """Return the modules called in one forward, in the order they return, each once."""
    order: list[str] = []
    handles = [
        pipeline.unet.get_submodule(path.removeprefix("unet.")).register_forward_hook(
            lambda *_, path=path: order.append(path)
        )
        for path in paths
    ]
    pipeline(PROMPT, num_inference_steps=1)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(order))
