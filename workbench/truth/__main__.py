"""``python -m workbench.truth``: what patches and attention maps are worth on a model of the shapes world."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from workbench import zoo
from workbench.errors import InputError, nearest
from workbench.experiments.experiment import Experiment
from workbench.experiments.site_changes import PatchSpec
from workbench.models.model import DiffusionModel
from workbench.models.quiet import quiet_run
from workbench.truth.editing import kept_places
from workbench.truth.entry import named_layers
from workbench.truth.methods import compare_methods
from workbench.truth.patching import colour_rates
from workbench.zoo import shapes
from workbench.zoo.language import SHAPES
from workbench.zoo.planted import PLANTED

Settings = dict[str, Any]
"""Arguments of a model's runs."""

STEPS = tuple(range(10, 20))
PATCH = PatchSpec(site="unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2", steps=STEPS, branch="cond")
"""Half of the steps of one layer: patched whole, the last block would make the source's own run.

The source leaves the target's run at the first of them. A source of its own has its circle elsewhere, since
words move it, and the patch would paint only where both are."""

ELSEWHERE = "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn2"
"""The other site: the cross-attention layer just before."""


def main(arguments: list[str] | None = None) -> None:
    """Print what there is to say of each model."""
    parser = argparse.ArgumentParser(prog="workbench.truth", description=__doc__)
    parser.add_argument("model", nargs="*", help=f"{', '.join(_TRUTHS)}; all that are there if none is named")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the patches")
    parser.add_argument("--prompts", type=int, default=50, help="prompts of the attention maps")
    given = parser.parse_args(arguments)
    for name in given.model or [each for each in _TRUTHS if each in zoo.models()]:
        if name not in _TRUTHS:
            raise InputError(f"Nothing is known by construction of {name!r}.{nearest(name, _TRUTHS)}")
        model = DiffusionModel(name)
        print(f"\n{name}\n")
        with quiet_run(model.pipeline):
            _TRUTHS[name](model, range(given.seeds), given.prompts, zoo.settings(name))


def of_unet(model: DiffusionModel, seeds: Sequence[int], prompts: int, settings: Settings) -> None:
    """Print the rates of the tour's patch, how maps meet their objects, how an edit keeps places."""
    experiment = Experiment(
        model="shapes-unet",
        source="a red circle",
        target="a blue circle",
        source_from=STEPS[0],
        interventions=(PATCH,),
        **settings,
    )
    print(f"{PATCH.site}, steps {STEPS[0]} to {STEPS[-1]}; elsewhere {ELSEWHERE}; reads red:")
    print(colour_rates(model, experiment, colour="red", elsewhere=ELSEWHERE, seeds=seeds))
    of_maps(model, seeds, prompts, settings)
    print(kept_places(model, "a red circle", "a blue circle", shape="circle", colour="blue", seeds=seeds))


def of_maps(model: DiffusionModel, _: Sequence[int], prompts: int, settings: Settings) -> None:
    """Print how the maps of "circle" meet the circle, by method, layer and step."""
    concepts = [*SHAPES, "background"]
    print(compare_methods(model, circle_prompts(prompts), "circle", concepts=concepts, **settings))


def of_planted(model: DiffusionModel, seeds: Sequence[int], prompts: int, settings: Settings) -> None:
    """Print which layer each method names, beside the one that it is."""
    named = named_layers(model, seeds=seeds, prompts=red_circle_prompts(prompts), **settings)
    width = max(map(len, named))
    print(f"{'planted':<{width}}  unet.{PLANTED}")
    for method, layer in named.items():
        print(f"{method:<{width}}  {layer}")


_TRUTHS: dict[str, Callable[[DiffusionModel, Sequence[int], int, Settings], None]] = {
    "shapes-unet": of_unet,
    "shapes-mmdit": of_maps,
    "shapes-planted": of_planted,
}


def red_circle_prompts(count: int) -> list[str]:
    """Return prompts that name exactly one circle, a red one, and nothing else that is red."""
    made = (prompt for seed in itertools.count() for prompt in circle_prompts(50, seed))
    fitting = (each for each in made if "red circle" in each and each.split().count("red") == 1)
    return list(itertools.islice(fitting, count))


def circle_prompts(count: int, seed: int = 0) -> list[str]:
    """Return prompts like the training ones that name exactly one circle."""
    rng = np.random.default_rng(seed)
    prompts: list[str] = []
    while len(prompts) < count:
        prompt = shapes.sample(rng).prompt()
        if prompt.split().count("circle") == 1:
            prompts.append(prompt)
    return prompts


if __name__ == "__main__":
    main()
