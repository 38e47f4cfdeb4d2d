"""Which layer does a word enter through? What patches, attention maps and concepts say, where it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from workbench.attention.request import Attention
from workbench.errors import InputError
from workbench.experiments.experiment import Experiment
from workbench.experiments.sweep import Sweep
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record
from workbench.truth.methods import BY_LAYER, CONCEPTS, compare_methods
from workbench.truth.patching import has_colour


@dataclass(frozen=True)
class Entry:
    """How often a layer that is given another word's keys and values alone decides what is painted.

    Attributes:
        seeds: how many were run.
        layers: by cross-attention layer, of how many the picture took the other word's colour.
    """

    seeds: int
    layers: dict[str, int]

    @property
    def named(self) -> str:
        """The layer that decides most often."""
        return max(self.layers, key=lambda layer: self.layers[layer])

    def __str__(self) -> str:
        """Return a line a layer."""
        width = max(map(len, self.layers))
        return "\n".join(
            f"{layer:<{width}}  {count:>3} of {self.seeds}" for layer, count in self.layers.items()
        )


def where_it_enters(
    model: DiffusionModel,
    source: str,
    target: str,
    *,
    colour: str,
    seeds: Sequence[int],
    **settings: Any,
) -> Entry:
    """Return which layer paints the source's colour when it alone has the source's keys and values.

    Args:
        model: a model of the shapes world with cross-attention.
        source: the prompt they are taken from.
        target: the prompt of the run that they are put into, at all steps.
        colour: the colour that the source names and the target does not.
        seeds: each gives a run a layer.
        **settings: arguments of the runs.
    """
    layers = [layer.path for layer in model.plan(Attention(), source, **settings).layers]
    ports = {tuple(f"{layer}:{port}" for port in ("key", "value")): layer for layer in layers}

    def painted(run: Record, *_: Record) -> float:
        return float(has_colour(run.images[0], colour))

    arguments = dict(settings)
    known = {name: arguments.pop(name, None) for name in ("num_inference_steps", "guidance_scale")}
    pair = Experiment(model=model.reference, source=source, target=target, arguments=arguments, **known)
    sweep = Sweep(
        pair,
        {"site": ports, "seed": seeds},
        metrics=[painted],
        controls=False,
    )
    found = dict.fromkeys(layers, 0)
    for result in sweep.measure(model):
        if result.error is not None:
            raise InputError(result.error)
        found[ports[sweep.point_of(result)["site"]]] += round(result.values["painted"] or 0)
    return Entry(len(seeds), found)


def named_layers(
    model: DiffusionModel, *, seeds: Sequence[int], prompts: Sequence[str], **settings: Any
) -> dict[str, str]:
    """Return the layer that each method names for the word "red", by the method.

    A patch names the layer that decides the colour; maps name the layer in which those of the word lie best
    on the object that has it.

    Args:
        model: a model of the shapes world with cross-attention.
        seeds: of the patches.
        prompts: of the maps, each with one red circle and nothing else that is red.
        **settings: arguments of the runs.
    """
    entry = where_it_enters(model, "a red circle", "a blue circle", colour="red", seeds=seeds, **settings)
    maps = compare_methods(model, prompts, "red", shape="circle", concepts=["red", "background"], **settings)
    return {
        "patched keys and values": entry.named,
        "raw weights": maps.best(BY_LAYER),
        "ConceptAttention": maps.best(f"{CONCEPTS}, "),
    }
