"""Map methods beside the raw weights: DAAM and ConceptAttention, each against its formula."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import workbench as wb
from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.errors import GuardError, InputError, UnknownNameError
from workbench.models.model import DiffusionModel

CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
SIZE = (16, 16)


def of_size(case):
    """What of a case's arguments the runs that read concepts need as well."""
    wanted = ("height", "width", "num_frames", "max_sequence_length", "prompt_template")
    return {name: value for name, value in case.arguments.items() if name in wanted}


def opened(name):
    case = tiny.CASES[name]
    return DiffusionModel(case.build()), dict(case.arguments)


@pytest.mark.parametrize("reduce", [["heads"], []])
def test_daam_is_the_mean_of_what_every_layer_and_step_says(reduce):
    model, arguments = opened("sd1")
    maps = model.record(**arguments, seed=0, capture=[wb.Attention(reduce=reduce)]).attention
    found = wb.daam(maps, "red", size=SIZE)
    large = []
    for weights in maps.layers.values():
        mean = weights if reduce else weights.mean(1)
        side = round(mean.shape[-1] ** 0.5)
        red = mean[:, 2].reshape(-1, 1, side, side)
        large.append(functional.interpolate(red, size=SIZE, mode="bicubic").clamp(min=0)[:, 0])
    assert found.shape == (16, 16)
    assert torch.allclose(found, torch.cat(large).mean(0), atol=1e-7)
    assert not torch.allclose(found, wb.daam(maps, "circle", size=SIZE), atol=1e-7)
    for parts in ({"layer": maps.layers}, {"step": maps.steps}):
        ((axis, names),) = parts.items()
        each = torch.stack([wb.daam(maps, "red", size=SIZE, **{axis: name}) for name in names])
        assert torch.allclose(each.mean(0), found, atol=1e-7)
        assert each.std(0).max() > 1e-5
    with pytest.raises(UnknownNameError, match="no word"):
        wb.daam(maps, "green", size=SIZE)
    own = model.record(**arguments, seed=0, capture=[wb.Attention(block="image->image")]).attention
    with pytest.raises(InputError, match="DAAM is of"):
        wb.daam(own, "red", size=SIZE)


def test_concepts_in_cross_attention_are_compared_by_their_values():
    model, arguments = opened("sd1")
    concepts = model.concepts(["circle", "blue square"])
    sites = [f"{CROSS}:heads"]
    record = model.record(**arguments, seed=0, capture=[concepts, *sites])
    values = []
    for prompt, columns in (("circle", [1]), ("blue square", [1, 2])):
        alone = model.record(prompt, seed=0, num_inference_steps=1, capture=[f"{CROSS}:value"])
        value = alone.at(f"{CROSS}:value", step=0, branch="cond")[0]
        values.append(value[:, columns].mean(1).flatten())
    for step in range(4):
        heads = record.at(sites[0], step=step, branch="cond")[0]
        expected = (torch.stack(values) @ heads.transpose(0, 1).flatten(1).T).softmax(0)
        assert torch.allclose(record.attention.layers[CROSS][step], expected, atol=1e-6)
    both = sum(record.attention.map(each, size=SIZE) for each in range(2))
    assert torch.allclose(both, torch.ones_like(both), atol=1e-5)
    assert [word.text for word in record.attention.words] == ["circle", "blue square"]


@pytest.mark.parametrize("name", ["sd3", "flux", "flux-cfg"])
def test_concepts_in_joint_attention_go_beside_the_prompt(name):
    """The run stays as it is, each place's shares sum to one, and no concept stands for another."""
    model, arguments = opened(name)
    plain = model.record(**arguments, seed=0)
    before = footprint(model.pipeline)
    concepts = model.concepts(["circle", "square"], **of_size(tiny.CASES[name]))
    record = model.record(**arguments, seed=0, capture=[concepts])
    assert as_bytes(record.latents) == as_bytes(plain.latents)
    assert footprint(model.pipeline) == before
    assert record.attention.layers
    cond = [row.call for row in record.ledger if row.has("cond")]
    for maps in record.attention.layers.values():
        assert maps.shape[:2] == (len(cond), 2)
        assert torch.allclose(maps.sum(1), torch.ones(len(cond), maps.shape[2]), atol=1e-5)
    swapped = model.record(
        **arguments,
        seed=0,
        capture=[
            type(concepts)(
                concepts.names[::-1],
                concepts.values,
                {path: tokens.flip(0) for path, tokens in concepts.tokens.items()},
            )
        ],
    )
    for path, maps in record.attention.layers.items():
        assert torch.allclose(swapped.attention.layers[path].flip(1), maps, atol=1e-5)


def test_a_text_as_concepts_puts_out_what_it_does_as_text():
    """The stream beside is the block on other text: given the very text, its output is the text's own."""
    model, arguments = opened("sd3")
    block = "transformer.transformer_blocks.0"
    source = model.record(
        **arguments, seed=0, capture=[f"{block}:inputs", f"{block}.attn:text_heads", f"{block}.attn:heads"]
    )
    _, given = source.passages(f"{block}:inputs")[0].value
    text = given["encoder_hidden_states"][-1]
    concepts = model.concepts(["circle"], max_sequence_length=24)
    everything = type(concepts)(tuple(map(str, range(len(text)))), {}, {block: text})
    maps = model.record(**arguments, seed=0, capture=[everything]).attention.layers[f"{block}.attn"]
    heads, words = (
        source.at(f"{block}.attn:{port}", step=0, branch="cond")[0].transpose(0, 1).flatten(1)
        for port in ("heads", "text_heads")
    )
    assert torch.allclose(maps[0], (words @ heads.T).softmax(0), atol=1e-5)


def test_concepts_and_what_does_not_go_with_them():
    model, arguments = opened("sd3")
    with pytest.raises(InputError, match="a list of words"):
        model.concepts("circle")
    concepts = model.concepts(["circle"], max_sequence_length=24)
    change = wb.Scale("transformer.transformer_blocks.0.ff", factor=2.0)
    with pytest.raises(GuardError, match="without interventions"):
        model.record(**arguments, capture=[concepts], interventions=[change])
    masked = tiny.FAMILIES["hunyuan-video"]
    film = DiffusionModel(masked.build())
    concepts = film.concepts(["circle"], **of_size(masked))
    with pytest.raises(GuardError, match="given attention_mask"):
        film.record(**masked.arguments, capture=[concepts])
    wordless, _ = opened("dit")
    with pytest.raises((InputError, UnknownNameError)):
        wordless.concepts(["circle"])
