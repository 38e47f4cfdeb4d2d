"""Noise on what a model is told."""

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError
from workbench.interventions.corrupt import Corrupt
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

TEXT = "unet:inputs[1].encoder_hidden_states"


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def run(model, prompt="a red circle", **asked):
    return model.record(prompt, seed=0, num_inference_steps=2, capture=[TEXT], **asked)


def test_noise_is_the_same_in_every_call_and_as_large_as_asked(model):
    plain, corrupt = run(model), run(model, interventions=[Corrupt(strength=2.0)])
    moved = [
        corrupt.at(TEXT, step=step, branch="cond") - plain.at(TEXT, step=step, branch="cond")
        for step in (0, 1)
    ]
    assert torch.equal(*moved)
    assert float(moved[0].std()) == pytest.approx(
        2 * float(plain.at(TEXT, step=0, branch="cond").std()), rel=0.1
    )
    assert torch.equal(corrupt.at(TEXT, step=0, branch="uncond"), plain.at(TEXT, step=0, branch="uncond"))
    other = run(model, interventions=[Corrupt(seed=1)])
    assert as_bytes(other.latents) != as_bytes(corrupt.latents)


def test_prompts_side_by_side_get_the_same_noise(model):
    two = run(model, ["a red circle", "a blue square"], interventions=[Corrupt(), Corrupt(samples=1)])
    alone = run(model, "a red circle", interventions=[Corrupt()])
    one = alone.at(TEXT, step=0, branch="cond")[0]
    assert torch.allclose(two.at(TEXT, step=0, branch="cond")[0], one, atol=1e-5)


def test_chosen_tokens_alone_are_corrupted(model):
    plain, corrupt = run(model), run(model, interventions=[Corrupt(tokens=(1, -1))])
    moved = corrupt.at(TEXT, step=0, branch="cond") != plain.at(TEXT, step=0, branch="cond")
    tokens = moved[0].any(-1).nonzero().flatten().tolist()
    assert tokens == [1, moved.shape[1] - 1]


def test_restoring_what_was_corrupted_restores_the_run_to_the_byte(model):
    clean = run(model)
    restored = run(model, interventions=[Corrupt(), Patch(TEXT, source=clean)])
    assert as_bytes(restored.latents) == as_bytes(clean.latents)


def test_what_is_no_strength_or_token_is_refused(model):
    with pytest.raises(InputError, match="strength="):
        Corrupt(strength=float("nan"))
    with pytest.raises(InputError, match="24 places"):
        run(model, interventions=[Corrupt(tokens=(10_000,))])
