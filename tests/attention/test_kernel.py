"""The ports ``query``, ``key``, ``value`` and ``text_heads``: what goes into the kernel and comes out."""

import pytest
import torch
from torch.nn import functional

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import GuardError, InputError, OutOfOrderError
from workbench.interventions.attach import Attach
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

LAYERS = {
    "sd1": "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "sd3": "transformer.transformer_blocks.0.attn",
    "flux": "transformer.single_transformer_blocks.0.attn",
    "pixart": "transformer.transformer_blocks.0.attn1",
    "wan": "transformer.blocks.0.attn1",
}
PORTS = ("query", "key", "value")
SD = LAYERS["sd1"]


def opened(name):
    case = tiny.CASES[name]
    return DiffusionModel(case.build()), case.arguments


@pytest.mark.parametrize("name", LAYERS)
def test_attention_over_them_is_what_the_heads_computed(name):
    model, arguments = opened(name)
    path = LAYERS[name]
    record = model.record(**arguments, seed=0, capture=[f"{path}:{port}" for port in (*PORTS, "heads")])
    query, key, value, heads = (record.at(f"{path}:{port}", step=1) for port in (*PORTS, "heads"))
    computed = functional.scaled_dot_product_attention(query, key, value)
    # Where attention is joint, the heads are the image's, on one side of the text or the other.
    image = [computed[:, :, : heads.shape[2]], computed[:, :, -heads.shape[2] :]]
    assert any(torch.allclose(each, heads, rtol=1e-5, atol=1e-6) for each in image)


@pytest.mark.parametrize("name", LAYERS)
def test_patched_with_themselves_they_change_no_byte(name):
    model, arguments = opened(name)
    sites = [f"{LAYERS[name]}:{port}" for port in PORTS]
    plain = model.record(**arguments, seed=0)
    source = model.record(**arguments, seed=0, capture=sites)
    patched = model.record(**arguments, seed=0, interventions=[Patch(site, source=source) for site in sites])
    assert as_bytes(plain.latents) == as_bytes(source.latents) == as_bytes(patched.latents)


@pytest.mark.parametrize("name", LAYERS)
def test_without_values_the_heads_are_zero(name):
    model, arguments = opened(name)
    path = LAYERS[name]
    silent = Attach(f"{path}:value", module=torch.zeros_like, steps=2)
    record = model.record(**arguments, seed=0, capture=[f"{path}:heads"], interventions=[silent])
    assert record.at(f"{path}:heads", step=2).abs().max() == 0
    assert record.at(f"{path}:heads", step=1).abs().max() > 0


def test_in_a_block_they_pass_one_after_the_other_and_can_be_replaced():
    model, arguments = opened("sd1")
    record = model.record(**arguments, seed=0, capture=[f"{SD}:{port}" for port in PORTS])
    layer = model.site(SD)
    with model.generate(**arguments, seed=0) as run:
        for _ in run.steps[:1]:
            for port in PORTS:
                assert torch.equal(getattr(layer, port), record.at(f"{SD}:{port}", step=0))
            layer.value = torch.zeros_like(layer.value)
            assert layer.heads.abs().max() == 0
            assert layer.output.shape[0] == 2
    assert as_bytes(run.latents[0]) != as_bytes(record.latents[0])
    assert "forward" not in vars(layer.module)


def test_a_layer_that_is_running_is_told_to_be_asked_before():
    model, arguments = opened("sd1")
    layer = model.site(SD)
    with model.generate(**arguments, seed=0) as run:
        for _ in run.steps[:1]:
            layer.input.save()
            with pytest.raises(OutOfOrderError, match=r"attn2:query did not pass.*attn2:input"):
                layer.query.save()
        for _ in run.steps[2:3]:
            assert layer.query.shape[0] == 2


def test_what_hands_nothing_to_the_kernel_says_so():
    model, arguments = opened("sd1")
    for site in ("unet.conv_in:query", "vae.decode:key"):
        with pytest.raises(InputError, match="Ask an attention layer"):
            model.record(**arguments, capture=[site])
    model.pipeline.enable_attention_slicing()
    with pytest.raises(GuardError, match=r"queries, keys.*disable_attention_slicing"):
        model.record(**arguments, capture=[f"{SD}:value"])


def test_a_block_around_layers_and_a_layer_with_half_a_batch_say_so():
    model, arguments = opened("sd1")
    with pytest.raises(InputError, match="BasicTransformerBlock has no query"):
        model.record(**arguments, capture=[f"{SD.removesuffix('.attn2')}:query"])
    perturbed = DiffusionModel(tiny.sd1_pag())
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    with pytest.raises(GuardError, match=r"hands \d of 3 rows|twice in one call"):
        perturbed.record(**arguments, seed=0, capture=[f"{layer}:value"])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_heads_of_the_text_are_what_its_projection_is_given(name):
    model, arguments = opened(name)
    path = "transformer.transformer_blocks.0.attn"
    record = model.record(**arguments, seed=0, capture=[f"{path}:text_heads", path])
    heads = record.at(f"{path}:text_heads", step=1)
    with torch.no_grad():
        text = model.site(path).module.to_add_out(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(text, record.at(f"{path}:output[1]", step=1))


def test_an_attention_without_text_of_its_own_has_no_text_heads():
    model, arguments = opened("flux")
    with pytest.raises(InputError, match="no text_heads: only a joint"):
        model.record(**arguments, capture=[f"{LAYERS['flux']}:text_heads"])
