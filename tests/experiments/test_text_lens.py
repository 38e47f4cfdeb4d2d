"""Pictures of a text encoder's layers and of its padding."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.errors import InputError, UnknownNameError
from workbench.experiments.text_lens import lens, padding_lens
from workbench.models.model import DiffusionModel

PROMPT = "a red circle on a dark background"
SHORT = {"num_inference_steps": 2, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def trained():
    model = DiffusionModel("shapes-unet")
    model.pipeline.set_progress_bar_config(disable=True)
    return model


def embedded(model, change):
    """A run whose text is what ``change`` makes of the encoder's output for the prompt."""
    encoder, tokenizer = model.pipeline.text_encoder, model.pipeline.tokenizer

    def states(prompt):
        ids = tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            return encoder(ids, output_hidden_states=True)

    with torch.no_grad():
        embeds = change(states(PROMPT), states(""))
    return model.record(prompt_embeds=embeds, seed=3, **SHORT).images[0]


def test_each_layer_is_what_its_states_make_behind_the_last_normalisation(trained):
    # What transformers puts on an encoder stays there after the first call that wants all states.
    embedded(trained, lambda said, _: said.last_hidden_state)
    before = footprint(trained.pipeline)
    pictures = wb.lens(trained, PROMPT, seed=3, **SHORT)
    assert footprint(trained.pipeline) == before
    assert list(pictures) == ["embeddings", "layer 1", "layer 2", "layer 3"]
    plain = trained.record(PROMPT, seed=3, **SHORT).images[0]
    assert as_bytes(pictures["layer 3"]) == as_bytes(plain)
    norm = trained.pipeline.text_encoder.final_layer_norm
    for layer, picture in enumerate(pictures.values()):
        by_hand = embedded(trained, lambda said, _, layer=layer: norm(said.hidden_states[layer]))
        assert as_bytes(picture) == as_bytes(by_hand)
    assert len({as_bytes(each) for each in pictures.values()}) == 4


def test_some_layers_are_chosen_by_number(trained):
    pictures = lens(trained, PROMPT, layers=[-1, 0], seed=3, **SHORT)
    assert list(pictures) == ["layer 3", "embeddings"]
    for layers in ([4], [-5]):
        with pytest.raises(InputError, match="has 3 layers"):
            lens(trained, PROMPT, layers=layers, **SHORT)


def test_padding_and_words_each_with_the_other_of_the_empty_prompt(trained):
    pictures = wb.padding_lens(trained, PROMPT, seed=3, **SHORT)
    assert list(pictures) == ["prompt", "words alone", "padding alone", "empty prompt"]
    # Start, seven words, end; the rest of 24 is padding.
    words = torch.arange(24)[:, None] < 9

    def put(first, second):
        return torch.where(words, first.last_hidden_state, second.last_hidden_state)

    assert as_bytes(pictures["words alone"]) == as_bytes(embedded(trained, put))
    assert as_bytes(pictures["padding alone"]) == as_bytes(embedded(trained, lambda a, b: put(b, a)))
    assert as_bytes(pictures["prompt"]) == as_bytes(trained.record(PROMPT, seed=3, **SHORT).images[0])
    noise = torch.Generator("cpu").manual_seed(3)
    assert as_bytes(pictures["empty prompt"]) == as_bytes(
        trained.pipeline("", generator=noise, **SHORT).images[0]
    )
    assert len({as_bytes(each) for each in pictures.values()}) == 4


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        pytest.param("sdxl", "text_encoder_2", id="CLIP, states before the last layer"),
        pytest.param("sd3", "text_encoder_3", id="T5 beside two CLIPs"),
        pytest.param("flux-cfg", "text_encoder_2", id="T5, another prompt in calls of its own"),
        pytest.param("pixart", "text_encoder", id="T5 alone"),
    ],
)
def test_in_every_family_the_last_layer_is_the_plain_run_and_others_are_not(name, encoder):
    case = tiny.CASES[name]
    model = DiffusionModel(case.build())
    arguments = {**case.arguments, "seed": 0, "output_type": "np"}
    plain = model.record(**arguments).images[0]
    before = footprint(model.pipeline)
    pictures = lens(model, encoder=encoder, **arguments)
    assert footprint(model.pipeline) == before
    assert len(pictures) == 3
    assert as_bytes(pictures["layer 2"]) == as_bytes(plain)
    assert as_bytes(pictures["embeddings"]) != as_bytes(plain)
    parts = padding_lens(model, encoder=encoder, **arguments)
    assert as_bytes(parts["prompt"]) == as_bytes(plain)
    assert as_bytes(parts["padding alone"]) != as_bytes(plain)


def test_guidance_keeps_its_own_text(trained):
    told = {"negative_prompt": "a blue square", "seed": 3, **SHORT}
    seen = []
    handle = trained.pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"].clone()), with_kwargs=True
    )
    lens(trained, PROMPT, layers=[0, 3], **told)
    handle.remove()
    whole, early = seen[0], seen[2]
    assert torch.equal(whole[0], early[0])
    assert not torch.equal(whole[1], early[1])


def test_what_cannot_be_looked_at_is_said(trained):
    with pytest.raises(UnknownNameError, match="'text_encoder'"):
        lens(trained, PROMPT, encoder="text_encodr", **SHORT)
    with pytest.raises(InputError, match="one prompt"):
        lens(trained, [PROMPT], **SHORT)
    with pytest.raises(InputError, match="no text encoder"):
        lens(DiffusionModel(tiny.ddpm()), PROMPT)
    full = " ".join(["red"] * 22)
    with pytest.raises(InputError, match="without padding"):
        padding_lens(trained, full, **SHORT)
