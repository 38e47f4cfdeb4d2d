"""``python -m workbench.truth``: what patches and attention maps are worth on a model of the shapes world."""

from __future__ import annotations

import argparse

import numpy as np

from workbench.experiments.experiment import Experiment, PatchSpec
from workbench.models.model import DiffusionModel
from workbench.models.quiet import quiet_run
from workbench.truth.attention import word_overlap
from workbench.truth.editing import kept_places
from workbench.truth.methods import compare_methods
from workbench.truth.patching import colour_rates
from workbench.zoo import shapes
from workbench.zoo.language import SHAPES

STEPS = tuple(range(10, 20))
PATCH = PatchSpec(site="unet.up_blocks.2.attentions.1.transformer_blocks.0.attn2", steps=STEPS, branch="cond")
"""Half of the steps of one layer: patched whole, the last block would make the source's own run.

The source leaves the target's run at the first of them. A source of its own has its circle elsewhere, since
words move it, and the patch would paint only where both are."""

ELSEWHERE = "unet.up_blocks.2.attentions.0.transformer_blocks.0.attn2"
"""The other site: the cross-attention layer just before."""


def main(arguments: list[str] | None = None) -> None:
    """Print the rates of the tour's patch and the overlap of words with their objects."""
    parser = argparse.ArgumentParser(prog="workbench.truth", description=__doc__)
    parser.add_argument("model", nargs="?", default="shapes-unet")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of the patch")
    parser.add_argument("--prompts", type=int, default=50, help="prompts of the attention maps")
    given = parser.parse_args(arguments)
    model = DiffusionModel(given.model)
    experiment = Experiment(
        model=given.model,
        source="a red circle",
        target="a blue circle",
        num_inference_steps=20,
        guidance_scale=3.0,
        source_from=STEPS[0],
        patches=(PATCH,),
    )
    with quiet_run(model.pipeline):
        print(f"{PATCH.site}, steps {STEPS[0]} to {STEPS[-1]}; elsewhere {ELSEWHERE}; reads red:")
        seeds = range(given.seeds)
        print(colour_rates(model, experiment, colour="red", elsewhere=ELSEWHERE, seeds=seeds))
        print(word_overlap(model, circle_prompts(given.prompts), "circle"))
        concepts = [*SHAPES, "background"]
        print(compare_methods(model, circle_prompts(given.prompts), "circle", concepts=concepts))
        print(
            kept_places(
                model,
                "a red circle",
                "a blue circle",
                shape="circle",
                colour="blue",
                seeds=range(given.seeds),
            )
        )


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
