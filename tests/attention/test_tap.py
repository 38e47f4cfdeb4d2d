"""What a layer hands to the kernel is seen by whatever name it calls it, and nothing else changes."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers.guiders import PerturbedAttentionGuidance
from diffusers.hooks import LayerSkipConfig
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from tests import tiny
from tests.attention.seen import KERNEL
from tests.watching import as_bytes
from workbench.attention.request import Attention
from workbench.models.model import DiffusionModel

SELF = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
PLAIN = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 0}
ASKED = {**PLAIN, "capture": [Attention()]}


class Calling:
    """A processor that calls the kernel by a name of one's own choice."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        read = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(given).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project, given in ((attn.to_q, hidden_states), (attn.to_k, read), (attn.to_v, read))
        )
        made = self.kernel(query, key, value)
        return attn.to_out[1](attn.to_out[0](made.transpose(1, 2).flatten(2)))


class Bound(Calling):
    """A processor that has the kernel by a name of its own."""

    def __init__(self):
        super().__init__(KERNEL)


class Named(Calling):
    """A processor that looks the kernel up in torch."""

    def __init__(self):
        super().__init__(lambda *given: functional.scaled_dot_product_attention(*given))


@pytest.fixture(scope="module")
def maps():
    return DiffusionModel(tiny.sd1()).record(**ASKED).attention.layers


def with_processors(make):
    pipeline = tiny.sd1()
    pipeline.unet.set_attn_processor({name: make() for name in pipeline.unet.attn_processors})
    return pipeline


def same(found, expected):
    assert functional.scaled_dot_product_attention is KERNEL
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[path], kept, atol=1e-6) for path, kept in expected.items())


@pytest.mark.parametrize("kind", [Named, Bound])
def test_the_kernel_is_seen_by_its_name_in_torch_and_by_a_processor_s_own(kind, maps):
    same(DiffusionModel(with_processors(kind)).record(**ASKED).attention.layers, maps)


def test_a_processor_that_is_exchanged_in_a_run_is_seen(maps):
    pipeline = with_processors(Named)

    def exchange(pipe, step, time, given):
        pipe.unet.set_attn_processor({name: Bound() for name in pipe.unet.attn_processors})
        return given

    same(DiffusionModel(pipeline).record(**ASKED, callback_on_step_end=exchange).attention.layers, maps)


def test_runs_in_two_threads_see_each_their_own(maps):
    models, found = [DiffusionModel(tiny.sd1()) for _ in range(2)], {}
    together = threading.Barrier(2)

    def run(index):
        together.wait()
        found[index] = models[index].record(**ASKED).attention.layers

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    for each in found.values():
        same(each, maps)
    assert len(found) == 2


def test_what_is_compiled_beside_watched_layers_is_not_compiled_again(maps):
    counter = CompileCounter()
    pipeline = tiny.sd1()
    model = DiffusionModel(pipeline)
    pipeline.unet.mid_block.compile(backend=counter)
    sites = [path for path in maps if ".mid_block." not in path]
    try:
        model.record(**PLAIN)
        compiled = counter.frame_count
        assert compiled
        found = model.record(**PLAIN, capture=[Attention(sites=sites)]).attention.layers
        model.record(**PLAIN)
    finally:
        torch.compiler.reset()
    assert counter.frame_count == compiled
    same(found, {path: maps[path] for path in sites})


@pytest.mark.parametrize("looks", [Attention(block="image->image", sites=[SELF]), f"{SELF}:query"])
def test_a_guider_that_changes_the_kernel_s_result_by_a_mode_of_its_own_goes_on(looks):
    """As `PerturbedAttentionGuidance` does, in a layer that is looked at."""
    case, found = tiny.FAMILIES["modular-sdxl"], []
    skipped = LayerSkipConfig(
        indices=[0],
        fqn="mid_block.attentions.0.transformer_blocks",
        skip_attention=False,
        skip_attention_scores=True,
        skip_ff=False,
    )
    for perturbed, capture in ((False, []), (True, []), (True, [looks])):
        pipeline = case.build()
        if perturbed:
            guider = PerturbedAttentionGuidance(
                perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0, perturbed_guidance_config=skipped
            )
            pipeline.update_components(guider=guider)
        found.append(
            as_bytes(DiffusionModel(pipeline).record(**case.arguments, seed=0, capture=capture).latents)
        )
    plain, alone, watched = found
    assert watched == alone != plain


def test_in_a_block_that_waits_in_a_layer_the_kernel_is_called_as_ever():
    model = DiffusionModel(tiny.sd1())
    layer = model.site("unet.mid_block.attentions.0.transformer_blocks.0.attn2")
    other = torch.randn(1, 1, 4, 8)
    with model.generate(**PLAIN) as run:
        for _ in run.steps:
            assert layer.query.shape[0] == 2
            made = functional.scaled_dot_product_attention(other, other, other)
            assert torch.equal(made, KERNEL(other, other, other))
    assert functional.scaled_dot_product_attention is KERNEL
