"""What attention maps cost: time beside the bare run's, memory beside the plan's, and one large layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

from tests.allocations import peak
from tests.benchmarks.processes import inside
from tests.benchmarks.table import PROMPT, Row, Setting, bounded, ratio, take_turns
from workbench import Attention, DiffusionModel

_REQUESTS = {
    "head-mean cross-attention of all layers": Attention(),
    "every head of all self-attention": Attention(block="image->image", reduce=[]),
}
_LAYER = """
import torch
from torch.nn import functional
from workbench.attention.softmax import weights
query, key, value = (torch.randn(1, 24, 4608, 128) for _ in range(3))
functional.scaled_dot_product_attention(query, key, value)
"""
_TEXT = "weights(query, key, queries=slice(512, None), columns=slice(0, 512), over_heads='mean')"
_WHOLE = "torch.softmax(query[:, :, 512:] @ key.transpose(-1, -2) / 128**0.5, -1)[..., :512].mean(1)"


def rows(setting: Setting) -> Iterator[Row]:
    """Yield the rows of a run, then those of one layer."""
    model = DiffusionModel(setting.model)
    seconds = take_turns(variants(model, setting.steps), setting.rounds)
    ours, theirs = "head-mean cross-attention of all layers", "processors replaced, every matrix kept"
    why = "the weights are computed beside the kernel, which stays on"
    yield Row(f"{ours} (bound 1.15)", bounded(seconds, ours, "bare", 1.15, why))
    yield Row(theirs, ratio(seconds, theirs, "bare"))
    bare = memory(model, setting.steps)
    for name, asked in _REQUESTS.items():
        planned = model.plan(asked, PROMPT, num_inference_steps=setting.steps).bytes
        above = memory(model, setting.steps, name) - bare
        said = f"{above / 2**20:.2f} MiB above the run without, × {above / planned:.2f} of the plan's"
        yield Row(f"{name}: peak memory (bound 1 ± 0.1)", said)
    for name, program in (("text columns by themselves", _TEXT), ("the whole matrix", _WHOLE)):
        found = [inside(_LAYER, program) for _ in range(3)]
        spent, above = (median(each) for each in zip(*found, strict=True))
        yield Row(
            f"4,608 tokens, 24 heads of 128, {name}", f"{spent:.1f} s, {above / 1024:.0f} MiB above the layer"
        )


def record(model: DiffusionModel, steps: int, name: str = "") -> Any:
    """Record a run, with one of the requests or without any."""
    kept = [_REQUESTS[name]] if name else []
    return model.record(PROMPT, seed=0, num_inference_steps=steps, capture=kept)


def memory(model: DiffusionModel, steps: int, name: str = "") -> int:
    """Return the most bytes that a run has allocated at once, counted in one that is not the first."""
    record(model, steps, name)
    return peak(lambda: record(model, steps, name))


def variants(model: DiffusionModel, steps: int) -> dict[str, Callable[[], Any]]:
    """Return the runs to time, by name."""
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)

    def bare() -> None:
        pipeline(PROMPT, num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(0))

    def replaced() -> None:
        before, kept = dict(pipeline.unet.attn_processors), list[torch.Tensor]()
        made = {
            name: Materialising(kept) if name.endswith("attn2.processor") else each
            for name, each in before.items()
        }
        pipeline.unet.set_attn_processor(made)
        bare()
        pipeline.unet.set_attn_processor(before)

    return {
        "bare": bare,
        "head-mean cross-attention of all layers": lambda: record(
            model, steps, "head-mean cross-attention of all layers"
        ),
        "processors replaced, every matrix kept": replaced,
    }


class Materialising:
    """Attention as tools that replace processors compute it: the whole matrix, kept for every head."""

    def __init__(self, kept: list[torch.Tensor]) -> None:
        self.kept = kept

    def __call__(
        self, layer: Any, hidden_states: Any, encoder_hidden_states: Any = None, **_: Any
    ) -> torch.Tensor:
        """Compute one layer."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = layer.head_to_batch_dim(layer.to_q(hidden_states))
        key, value = (layer.head_to_batch_dim(project(text)) for project in (layer.to_k, layer.to_v))
        probs = layer.get_attention_scores(query, key)
        self.kept.append(probs.detach().clone())
        made = layer.batch_to_head_dim(torch.bmm(probs, value))
        result: torch.Tensor = layer.to_out[1](layer.to_out[0](made))
        return result
