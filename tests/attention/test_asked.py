"""What nobody can mean is refused by name before a run is under way, or where the layer is first met."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench as wb
from tests import tiny
from workbench.attention.request import Attention
from workbench.errors import InputError, UnknownNameError
from workbench.models.model import DiffusionModel

RUN = {"prompt": "a red circle", "num_inference_steps": 3, "seed": 0}
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"heads": [0.5]}, r"heads=\[0.5\] takes integers"),
        ({"heads": ["0"]}, r"heads=\['0'\] takes integers"),
        ({"heads": [0, 0]}, "names one twice"),
        ({"queries": ["a"]}, "queries.*takes integers"),
        ({"dtype": torch.int8}, "Give a floating one"),
        ({"dtype": "float17"}, "no dtype"),
        ({"pixels": (0.5, 0.2)}, r"points \(x, y\).*\(0.5, 0.2\) are none"),
        ({"pixels": [(0.1, 0.2, 0.3)]}, r"points \(x, y\)"),
        ({"budget": "1GB"}, "no number of bytes"),
        ({"reduce": None}, "reduce takes a list"),
        ({"sites": [1]}, "paths of attention layers; 1 is none"),
        ({"sample": "0"}, "no sample"),
    ],
)
def test_what_is_of_no_kind_that_fits_is_refused_at_once(asked, said):
    with pytest.raises(InputError, match=said):
        Attention(**asked)


def test_an_unknown_block_is_refused_whatever_it_is():
    with pytest.raises(UnknownNameError, match="no block None"):
        Attention(block=None)


def test_numbers_of_numpy_and_torch_are_numbers():
    asked = Attention(
        block="image->image", queries=torch.tensor([0, 3]), heads=torch.arange(1), dtype="float16"
    )
    assert (asked.queries, asked.heads, asked.dtype) == ((0, 3), (0,), torch.float16)
    assert Attention(block="image->image", pixels=np.array([[0.5, 0.25]])).pixels == ((0.5, 0.25),)


def test_a_head_that_a_layer_has_not_is_refused_with_those_it_has(model):
    said = r"attn2 has 2 heads \(0 to 1\); 9 is none of them"
    with pytest.raises(InputError, match=said):
        model.record(**RUN, capture=[Attention(heads=[9])])
    with pytest.raises(InputError, match=said):
        model.plan(Attention(heads=[9]), **{name: RUN[name] for name in ("prompt", "num_inference_steps")})


def test_the_map_of_a_phrase_is_read_by_the_phrase(model):
    maps = model.record(**RUN, capture=[Attention(words=["red circle"])]).attention
    whole = model.record(**RUN, capture=[Attention()]).attention
    for word in ("red circle", "Red circle", 0):
        assert torch.allclose(
            maps.map(word, size=(64, 64)), whole.map("red circle", size=(64, 64)), atol=1e-6
        )
    assert wb.daam(maps, "red circle", size=(64, 64)).shape == (64, 64)


def test_a_block_that_no_layer_has_is_refused(model):
    with pytest.raises(InputError, match="No layer of this model has attention text->image"):
        model.record(**RUN, capture=[Attention(block="text->image")])


def test_daam_of_a_record_says_where_its_maps_are(model):
    with pytest.raises(InputError, match=r"not of Record\. Give record\.attention"):
        wb.daam(model.record(**RUN), "circle", size=(64, 64))


def test_a_class_in_place_of_a_request_is_refused(model):
    with pytest.raises(InputError, match="captures nothing"):
        model.record(**RUN, capture=[Attention])


def test_an_edit_that_changed_weights_would_drop_is_refused(model):
    edit = wb.Reweight(LAYER, words={"red": 4.0})
    halved = wb.Scale(f"{LAYER}:probs", factor=0.5, branch="cond")
    for both in ([edit, halved], [halved, edit]):
        with pytest.raises(InputError, match=r"attn2 an edit of attention acts where the weights"):
            model.record(**RUN, interventions=both)
    elsewhere = wb.Scale(f"{LAYER}:probs", factor=0.5, branch="uncond")
    alone, together = (
        model.record(**RUN, interventions=some).latents for some in ([elsewhere], [edit, elsewhere])
    )
    assert not torch.equal(torch.as_tensor(alone), torch.as_tensor(together))


@pytest.mark.parametrize("name", ["sd1", "sd3"])
def test_the_words_of_the_branch_without_the_prompt_are_the_negative_prompt_s(name):
    case = tiny.CASES[name]
    model, told = DiffusionModel(case.build()), {**case.arguments, "seed": 0}
    negative = {**told, "negative_prompt": "a green square"}
    found = model.record(**negative, capture=[Attention(branch="uncond", words=["green"])]).attention
    swapped = {**told, "prompt": "a green square", "negative_prompt": told["prompt"]}
    expected = model.record(**swapped, capture=[Attention(words=["green"])]).attention
    for path, kept in expected.layers.items():
        assert torch.allclose(found.layers[path][0], kept[0], atol=1e-6)
    with pytest.raises(UnknownNameError, match="no word 'circle'"):
        model.record(**negative, capture=[Attention(branch="uncond", words=["circle"])])
    empty = model.record(**told, capture=[Attention(branch="uncond")]).attention
    assert all(word.special for word in empty.words)


def test_an_edit_of_the_branch_without_the_prompt_is_of_the_negative_prompt_s_words(model):
    told = {**RUN, "negative_prompt": "a green square"}
    plain, edited = (
        model.record(**told, interventions=some).latents
        for some in ([], [wb.Reweight(LAYER, words={"green": 4.0}, branch="uncond")])
    )
    assert not torch.equal(torch.as_tensor(plain), torch.as_tensor(edited))
    with pytest.raises(UnknownNameError, match="no word 'circle'"):
        model.record(**told, interventions=[wb.Reweight(LAYER, words={"circle": 4.0}, branch="uncond")])
