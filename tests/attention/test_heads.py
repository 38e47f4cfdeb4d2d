"""The port ``heads``: right against the layers' own projections, and editable one head at a time."""

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

LAYERS = {
    "sd1": ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2", 2),
    "sd3": ("transformer.transformer_blocks.0.attn", 2),
    "flux": ("transformer.single_transformer_blocks.0.attn", 2),
    "pixart": ("transformer.transformer_blocks.0.attn1", 2),
}


def opened(name):
    case = tiny.CASES[name]
    return DiffusionModel(case.build()), case.arguments


@pytest.mark.parametrize("name", LAYERS)
def test_heads_are_what_the_projection_is_given(name):
    model, arguments = opened(name)
    path, heads = LAYERS[name][0], model.site(LAYERS[name][0]).heads
    record = model.record(**arguments, seed=0, capture=[f"{path}:heads", path])
    value = record.at(f"{path}:heads", step=0)
    assert value.shape[1] == heads
    joined = value.transpose(1, 2).flatten(2)
    layer = model.site(path).module
    expected = record.passages(path)[0].value
    expected = expected[0] if isinstance(expected, tuple) else expected
    with torch.no_grad():
        projected = layer.to_out[0](joined) if getattr(layer, "to_out", None) is not None else joined
    torch.testing.assert_close(projected.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_patching_heads_with_themselves_changes_no_byte(name):
    model, arguments = opened(name)
    site = f"{LAYERS[name][0]}:heads"
    source = model.record(**arguments, seed=0, capture=[site])
    patched = model.record(**arguments, seed=0, interventions=[Patch(site, source=source)])
    assert as_bytes(patched.latents) == as_bytes(source.latents)


def test_one_head_can_be_ablated_in_a_block():
    model, arguments = opened("sd1")
    path = LAYERS["sd1"][0]
    plain = model.record(**arguments, seed=0, capture=[f"{path}:heads"])
    with model.generate(**arguments, seed=0) as run:
        for _ in run.steps[:1]:
            model.site(path).heads[:, 0] = 0
    assert as_bytes(run.latents[0]) != as_bytes(plain.latents[0])
    with model.generate(**arguments, seed=0) as untouched:
        for _ in untouched.steps[:1]:
            assert torch.equal(model.site(path).heads, plain.at(f"{path}:heads", step=0))
    assert as_bytes(untouched.latents) == as_bytes(plain.latents)


def test_what_has_no_heads_says_so():
    model, arguments = opened("sd1")
    for site in ("unet.conv_in:heads", "vae.decode:heads"):
        with pytest.raises(InputError, match="no heads"):
            model.record(**arguments, capture=[site])
