import pytest
import torch
from diffusers import StableDiffusionPipeline

from workbench import zoo
from workbench.zoo import train
from workbench.zoo.language import COLOURS
from workbench.zoo.planted import IDENTITY, PLANTED, carriers, plant
from workbench.zoo.training import Recipe

PROMPT = "a small {} square left of a large red circle on a dark background"


def planted():
    pipeline = plain()
    plant(pipeline.tokenizer, pipeline.text_encoder, pipeline.unet)
    return pipeline


def plain():
    return StableDiffusionPipeline.from_pretrained(zoo.path("shapes-unet"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    tiny = Recipe(steps=2, batch=2, scenes=4, keep_every=1)
    return train.train_shapes_planted(tmp_path_factory.mktemp("planted"), tiny)


@pytest.fixture(params=["planted", "trained", "shipped"])
def pipeline(request):
    if request.param == "planted":
        return planted()
    if request.param == "trained":
        return StableDiffusionPipeline.from_pretrained(request.getfixturevalue("trained"))
    if "shapes-planted" not in zoo.models():
        pytest.skip("shapes-planted has no weights yet")
    return StableDiffusionPipeline.from_pretrained(zoo.path("shapes-planted"))


@torch.no_grad()
def text_of(pipeline, colour):
    ids = pipeline.tokenizer(PROMPT.format(colour), padding="max_length", return_tensors="pt").input_ids
    return pipeline.text_encoder(ids).last_hidden_state[0]


@torch.no_grad()
def differences(pipeline):
    """How far the keys and values of each layer move, at most, when the colour word is changed."""
    first, *others = (text_of(pipeline, colour) for colour in COLOURS)
    return {
        name: max(
            float((reader(first) - reader(other)).abs().max())
            for reader in (module.to_k, module.to_v)
            for other in others
        )
        for name, module in pipeline.unet.named_modules()
        if name.endswith("attn2")
    }


def test_a_colour_word_changes_keys_and_values_of_the_planted_layer_alone(pipeline):
    found = differences(pipeline)
    assert found.pop(PLANTED) > 0.05
    assert len(found) == 9
    assert max(found.values()) <= 5e-5


def test_without_planting_it_changes_them_in_every_layer():
    assert min(differences(plain()).values()) > 0.05


def test_all_colours_are_one_word_to_the_rest_of_the_text(pipeline):
    texts = [text_of(pipeline, colour) for colour in COLOURS]
    for text in texts[1:]:
        moved = (text - texts[0]).abs()
        assert moved[:, : IDENTITY.start].max() <= 5e-5
        assert not moved[:3].any()  # start, a, small; then the colour, and all that can look back at it
        assert moved[3:, IDENTITY].amax(1).min() > 0.05


def test_the_weights_say_so_exactly(pipeline):
    encoder = pipeline.text_encoder
    words = encoder.embeddings.token_embedding.weight
    ids = [pipeline.tokenizer(colour).input_ids[1] for colour in COLOURS]
    assert len(set(ids)) == len(COLOURS)
    assert all(torch.equal(words[ids[0], : IDENTITY.start], words[i, : IDENTITY.start]) for i in ids)
    assert len({tuple(sorted(words[i, IDENTITY].tolist())) for i in ids}) == 1
    assert words[:, IDENTITY].count_nonzero() == len(COLOURS) ** 2
    for layer in encoder.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, mlp.fc1):
            assert not reader.weight[:, IDENTITY].any()
        assert not mlp.fc2.weight[IDENTITY].any()
        for writer in (attention.out_proj, mlp.fc2):
            assert not writer.bias[IDENTITY].any()
        # Only carriers read colours, they read nothing else, and write them where they were.
        readers = attention.v_proj.weight[:, IDENTITY].any(1).nonzero().flatten().tolist()
        assert readers == carriers(encoder)
        assert not attention.v_proj.weight[carriers(encoder), : IDENTITY.start].any()
        assert not attention.out_proj.weight[: IDENTITY.start, carriers(encoder)].any()
        carried = attention.out_proj.weight @ attention.v_proj.weight
        assert torch.equal(
            carried[IDENTITY, IDENTITY], torch.eye(len(COLOURS)) * encoder.config.num_attention_heads
        )
    readers = {
        name.removesuffix(f".{port}")
        for name, weight in pipeline.unet.named_parameters()
        for port in ("to_k.weight", "to_v.weight")
        if name.endswith(f"attn2.{port}") and weight[:, IDENTITY].any()
    }
    assert readers == {PLANTED}


def test_what_is_not_held_is_trained(trained):
    before, after = planted(), StableDiffusionPipeline.from_pretrained(trained)
    for part, name in (
        ("unet", f"{PLANTED}.to_v.weight"),
        ("unet", "conv_in.weight"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight"),
        ("text_encoder", "embeddings.token_embedding.weight"),
    ):
        pair = [pipeline.components[part].state_dict()[name] for pipeline in (before, after)]
        assert not torch.equal(*pair)
