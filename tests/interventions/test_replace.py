"""A value of one's own in place of an activation."""

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, ShapeError
from workbench.interventions.patch import Patch
from workbench.interventions.replace import Replace
from workbench.models.model import DiffusionModel

TEXT, MIDDLE = "unet:inputs[1].encoder_hidden_states", "unet.mid_block"


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def run(model, prompt="a red circle", **asked):
    return model.record(prompt, seed=0, num_inference_steps=2, capture=[TEXT, MIDDLE], **asked)


def test_an_embedding_that_is_given_is_what_the_prompt_it_comes_from_is(model):
    other = run(model, "a blue square")
    embedding = other.at(TEXT, step=0, branch="cond")[0]
    given = run(model, interventions=[Replace(TEXT, value=embedding, branch="cond")])
    assert as_bytes(given.latents) == as_bytes(other.latents)


def test_one_token_is_replaced_alone(model):
    plain, width = run(model), run(model).at(TEXT, step=0).shape[-1]
    replaced = run(model, interventions=[Replace(TEXT, value=torch.ones(width), tokens=(2,), branch="cond")])
    moved = replaced.at(TEXT, step=0, branch="cond") != plain.at(TEXT, step=0, branch="cond")
    assert moved[0].any(-1).nonzero().flatten().tolist() == [2]
    assert (replaced.at(TEXT, step=1, branch="cond")[0, 2] == 1).all()


def test_latents_that_are_given_go_on(model):
    source = run(model, "a blue square")
    latents = source.latents[0][0]
    given = run(model, interventions=[Replace("latents", steps=[0], value=latents)])
    patched = run(model, interventions=[Patch("latents", steps=[0], source=run_with_latents(model))])
    assert as_bytes(given.latents) == as_bytes(patched.latents)


def run_with_latents(model):
    return model.record("a blue square", seed=0, num_inference_steps=2, capture=["latents"])


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ShapeError, match=r"the value is .*\(5,\).*broadcasts"):
        run(model, interventions=[Replace(MIDDLE, value=torch.ones(5))])
    with pytest.raises(InputError, match="Patch"):
        Replace(MIDDLE, value=1.0)
    with pytest.raises(InputError, match="not finite"):
        Replace(MIDDLE, value=torch.tensor([float("nan")]))
