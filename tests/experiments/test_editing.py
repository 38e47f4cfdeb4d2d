"""Prompt-to-prompt: which tokens correspond, what is put in, and that a shape keeps its place."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, UnknownNameError
from workbench.experiments.editing import align
from workbench.models.model import DiffusionModel

STEPS = 4


def test_tokens_that_correspond():
    same = align([1, 2, 3], [1, 2, 3])
    assert torch.equal(same, torch.eye(3))
    swapped = align([1, 2, 3], [1, 9, 3])
    assert torch.equal(swapped, torch.eye(3))
    added = align([1, 2, 3], [1, 7, 2])
    assert added.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]
    longer = align([1, 2, 3], [1, 8, 9, 3])
    assert longer.tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    shorter = align([1, 2, 4, 3], [1, 9, 3])
    assert shorter.tolist() == [[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "flux"])
def test_the_same_prompt_makes_the_same_bytes(name):
    case = tiny.CASES[name]
    model = DiffusionModel(case.build())
    source = model.record(**case.arguments, seed=0)
    again = wb.prompt_to_prompt(source, "a red circle", cross=0.5, own=0.5)
    assert as_bytes(again.latents) == as_bytes(source.latents)


def test_a_list_of_one_prompt_and_a_length_of_its_own_are_the_same():
    model = DiffusionModel(tiny.sd3())
    arguments = {"seed": 0, "num_inference_steps": 3, "max_sequence_length": 16}
    one = model.record("a red circle", **arguments)
    listed = model.record(["a red circle"], **arguments)
    edits = [wb.prompt_to_prompt(each, "a red large circle", cross=0.7) for each in (one, listed)]
    assert as_bytes(edits[0].latents) == as_bytes(edits[1].latents) != as_bytes(one.latents)


def test_all_of_the_attention_is_keys_and_queries_of_the_source():
    case = tiny.CASES["sd1"]
    model = DiffusionModel(case.build())
    source = model.record(**case.arguments, seed=0)
    layers = list(model.record(**case.arguments, capture=[wb.Attention()]).attention.layers)
    layers += [path.replace("attn2", "attn1") for path in layers]
    sites = [f"{path}:{port}" for path in layers for port in ("query", "key")]
    kept = model.record(**case.arguments, seed=0, capture=sites)
    patches = [wb.Patch(site, range(2), "cond", source=kept) for site in sites]
    by_hand = model.record("a blue circle", seed=0, num_inference_steps=4, interventions=patches)
    edited = wb.prompt_to_prompt(source, "a blue circle", cross=0.5, own=0.5)
    assert as_bytes(edited.latents) == as_bytes(by_hand.latents)
    plain = model.record("a blue circle", seed=0, num_inference_steps=4)
    assert as_bytes(wb.prompt_to_prompt(source, "a blue circle", cross=0, own=0).latents) == as_bytes(
        plain.latents
    )


def test_words_are_reweighted_on_top():
    case = tiny.CASES["sd1"]
    model = DiffusionModel(case.build())
    source = model.record(**case.arguments, seed=0)
    edited = wb.prompt_to_prompt(source, "a red circle", cross=0, own=0, reweight={"red": 3.0})
    by_hand = model.record(**case.arguments, seed=0, interventions=[wb.Reweight(words={"red": 3.0})])
    assert as_bytes(edited.latents) == as_bytes(by_hand.latents)
    with pytest.raises(UnknownNameError, match="no word 'green'"):
        wb.prompt_to_prompt(source, "a red circle", reweight={"green": 3.0})


def test_blended_only_the_words_place_changes():
    model = DiffusionModel("shapes-unet")
    arguments = {"num_inference_steps": 10, "guidance_scale": 3.0}
    source = model.record("a red circle left of a blue square", seed=3, **arguments)
    edited = wb.prompt_to_prompt(
        source, "a red circle left of a green square", cross=0.8, own=0.4, blend=("square", "square")
    )
    change = (edited.latents[-1] - source.latents[-1]).abs().amax(1)[0]
    kept = change == 0
    assert 0.05 < kept.float().mean() < 0.98
    assert change.max() > 0.1


def test_what_cannot_be_done_says_so():
    case = tiny.CASES["sd1"]
    source = DiffusionModel(case.build()).record(**case.arguments, seed=0)
    with pytest.raises(InputError, match=r"cross=1\.5"):
        wb.prompt_to_prompt(source, "a", cross=1.5)
    with pytest.raises(UnknownNameError, match="no word 'green'"):
        wb.prompt_to_prompt(source, "a blue circle", blend=("green", "blue"))
    changed = source.fork(0, interventions=[wb.Scale("unet.mid_block", factor=2.0)])
    with pytest.raises(InputError, match="plain run of one prompt"):
        wb.prompt_to_prompt(changed, "a blue circle")
    source.model = None
    with pytest.raises(InputError, match="does not know its model"):
        wb.prompt_to_prompt(source, "a")
