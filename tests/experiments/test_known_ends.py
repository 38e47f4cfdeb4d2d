"""Patches whose end is known: everything the words do, and the one layer that reads a colour."""

import numpy as np
import pytest

from tests.watching import as_bytes
from workbench import zoo
from workbench.attention.request import Attention
from workbench.experiments.experiment import Experiment
from workbench.experiments.sweep import Sweep
from workbench.experiments.together import fork_rows
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.zoo.planted import PLANTED

STEPS = 6


def ports(model, settings):
    layers = model.plan(Attention(), "a red circle", **settings).layers
    return {layer.path: (f"{layer.path}:key", f"{layer.path}:value") for layer in layers}


@pytest.mark.parametrize("name", ["shapes-unet", "shapes-planted"])
def test_all_keys_and_values_of_the_words_give_the_sources_picture_to_the_byte(name):
    if name not in zoo.models():
        pytest.skip(f"{name} has no weights yet")
    model = DiffusionModel(name)
    settings = zoo.settings(name) | {"num_inference_steps": STEPS}
    every = tuple(site for pair in ports(model, settings).values() for site in pair)
    pair = Experiment(model=name, source="a red circle", target="a small blue square", **settings)
    sweep = Sweep(pair, {"site": [every], "seed": [0]}, branch="cond")
    source = model.record("a red circle", seed=0, **settings)
    patched = sweep.run_at(model)
    assert as_bytes(patched.images[0]) == as_bytes(source.images[0])
    assert as_bytes(patched.latents[-1]) == as_bytes(source.latents[-1])
    # Control: all but one layer's are not enough.
    fewer = Sweep(pair, {"site": [every[:-2]], "seed": [0]}, branch="cond")
    assert as_bytes(fewer.run_at(model).images[0]) != as_bytes(source.images[0])


def test_rows_of_one_run_are_what_runs_of_their_own_are():
    model = DiffusionModel("shapes-unet")
    settings = zoo.settings("shapes-unet") | {"num_inference_steps": STEPS}
    sites = [f"unet.{path}" for path in ("mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2")]
    source = model.record("a red circle", seed=0, capture=sites, **settings)
    target = model.record("a small blue square", seed=0, **settings)
    changes = [[Patch(site, source=source, steps=step)] for site in sites for step in (2, 3)]
    rows = fork_rows([target] * 8, changes, 2, pictures=False)
    for row, change in zip(rows, changes, strict=True):
        alone = target.fork(2, interventions=change).latents
        assert float((row.latents - alone).abs().max()) <= 1e-5 * float(alone.abs().max())
        assert float((row.latents - target.latents).abs().max()) > 1e-3 * float(alone.abs().max())


@pytest.mark.skipif("shapes-planted" not in zoo.models(), reason="shapes-planted has no weights yet")
def test_the_map_of_a_colour_names_the_planted_layer():
    model = DiffusionModel("shapes-planted")
    settings = zoo.settings("shapes-planted") | {"num_inference_steps": STEPS}
    layers = ports(model, settings)
    pair = Experiment(model="shapes-planted", source="a red circle", target="a blue circle", **settings)
    axes = {"site": layers.values(), "step": [0, STEPS // 2], "seed": [0]}
    found = Sweep(pair, axes, window="from here", metrics=["towards_latents"]).run(model)
    by_layer = found.towards_latents.max("step").squeeze("seed").values
    assert list(layers)[int(by_layer.argmax())] == f"unet.{PLANTED}"
    others = np.delete(by_layer, by_layer.argmax())
    # Of the others not one reads the colour: what they do is rounding.
    assert by_layer.max() > 0.5
    assert np.abs(others).max() < 0.02
    assert float(np.abs(found.towards_latents_random).max()) < by_layer.max() / 2
    assert (found.towards_latents_identity == 0).all()
