"""Which branch is which: by the pipeline's label, by the order of calls, by what the words became."""

import pytest
import torch
from torch import nn

from tests import tiny
from tests.tiny.images import lumina, z_image
from workbench.errors import InputError
from workbench.models.model import DiffusionModel
from workbench.tracing.branches import Branches
from workbench.tracing.rig import Rig
from workbench.tracing.system import System

PROMPT = "a red circle"
SAMPLE = torch.zeros(2, 4, 8, 8)


class Encoder(nn.Module):
    """Makes something else of each text."""

    def forward(self, input_ids):
        return {"last_hidden_state": torch.sin(input_ids.float())[..., None].expand(-1, -1, 4).clone()}


def encoded(*texts, prompt=PROMPT):
    """Let an encoder read texts in this order; return the branches' observer and what became of each."""
    tokenizer, encoder = tiny.clip_tokenizer(), Encoder()
    branches = Branches(System({"tokenizer": tokenizer, "text_encoder": encoder}, print), 1, prompt)
    rig = Rig()
    branches.attach(rig)
    ids = [tokenizer(text, padding="max_length", return_tensors="pt").input_ids for text in texts]
    made = {text: encoder(input_ids=each)["last_hidden_state"] for text, each in zip(texts, ids, strict=True)}
    rig.sweep()
    return branches, made


def named(branches, conditions, sample=SAMPLE):
    return branches.of("unet", (sample, 500), {"encoder_hidden_states": conditions}, 0)


@pytest.mark.parametrize("texts", [(PROMPT, ""), ("", PROMPT), (PROMPT, "a blue square")])
@pytest.mark.parametrize("prompt", [PROMPT, [PROMPT]])
def test_the_words_tell_the_halves_of_a_batch_apart_whichever_was_encoded_first(texts, prompt):
    negative = next(text for text in texts if text != PROMPT)
    branches, made = encoded(*texts, prompt=prompt)
    assert named(branches, torch.cat([made[PROMPT], made[negative]])) == ("cond", "uncond")
    branches, made = encoded(*texts, prompt=prompt)
    assert named(branches, torch.cat([made[negative], made[PROMPT]])) == ("uncond", "cond")


def test_without_a_trace_of_the_words_the_unconditional_half_comes_first():
    branches, _ = encoded(PROMPT, "")
    assert named(branches, torch.randn(2, 24, 4)) == ("uncond", "cond")
    branches, made = encoded(PROMPT, "", prompt=None)
    assert named(branches, torch.cat([made[PROMPT], made[""]])) == ("uncond", "cond")


def test_the_pipelines_own_label_comes_first():
    branches, _ = encoded()
    branches.label = "pred_uncond"
    assert named(branches, None, SAMPLE[:1]) == ("uncond",)
    branches.label = "uncond_stg"
    assert named(branches, None, SAMPLE[:1]) == ("uncond_stg",)


def test_a_label_of_both_is_told_apart_by_the_batch():
    branches, _ = encoded()
    branches.label = "cond_uncond"
    assert named(branches, None) == ("uncond", "cond")
    assert named(branches, None, SAMPLE[:1]) == ("cond",)


@pytest.mark.parametrize(
    ("build", "arguments", "branches"),
    [
        (tiny.pix2pix, {"image": tiny.picture()}, ("cond", "image", "uncond")),
        (tiny.pix2pix, {"image": tiny.picture(), "guidance_scale": 1.0}, ("cond",)),
        (tiny.sd1_pag, {}, ("uncond", "cond", "perturbed")),
        (tiny.sd1_pag, {"guidance_scale": 1.0}, ("cond", "perturbed")),
        (tiny.sd1_pag, {"pag_scale": 0.0}, ("uncond", "cond")),
    ],
)
def test_guidance_of_more_ways_is_named(build, arguments, branches):
    model = DiffusionModel(build())
    record = model.record(**tiny.WORDED, **arguments, seed=0, capture=["unet.conv_in"])
    assert {row.branches for row in record.ledger} == {branches}
    whole = record.at("unet.conv_in", step=1)
    parts = [record.at("unet.conv_in", step=1, branch=branch) for branch in branches]
    assert torch.equal(torch.cat(parts), whole)


class LuminaNextDiT2DModel(nn.Module):
    """Called as the denoiser that has its conditional half first."""

    def forward(self, hidden_states, timestep):
        return hidden_states


class OmniGenTransformer2DModel(LuminaNextDiT2DModel):
    """Likewise; with pictures it has a third part, which has those alone."""


class ZImageTransformer2DModel(LuminaNextDiT2DModel):
    """Likewise; it takes its samples as a list."""


@pytest.mark.parametrize(
    ("kind", "sample", "expected"),
    [
        (LuminaNextDiT2DModel, SAMPLE, ("cond", "uncond")),
        (OmniGenTransformer2DModel, SAMPLE, ("cond", "uncond")),
        (OmniGenTransformer2DModel, torch.zeros(3, 4, 8, 8), ("cond", "uncond", "image")),
        (ZImageTransformer2DModel, [torch.zeros(4, 1, 8, 8)] * 2, ("cond", "uncond")),
        (ZImageTransformer2DModel, [torch.zeros(4, 1, 8, 8)] * 3, ("guide0", "guide1", "guide2")),
        (ZImageTransformer2DModel, [torch.zeros(4, 1, 8, 8)], ("cond",)),
    ],
)
def test_a_denoiser_whose_pipelines_put_the_condition_first_is_known(kind, sample, expected):
    branches = Branches(System({"transformer": kind()}, print), 1, PROMPT)
    assert branches.of("transformer", (sample, 500), {}, 0) == expected


def test_luminas_conditional_rows_are_those_the_prompt_changes():
    model = DiffusionModel(lumina())
    site = "transformer:inputs"
    asked = {"num_inference_steps": 1, "height": 32, "width": 32, "clean_caption": False}
    told = []
    for prompt in ("a red circle", "a blue square"):
        record = model.record(prompt, **asked, output_type="latent", seed=0, capture=[site])
        told.append(record.passages(site)[0].value[1]["encoder_hidden_states"])
    same = [torch.equal(one, other) for one, other in zip(*told, strict=True)]
    branches = record.ledger[0].branches
    assert dict(zip(branches, same, strict=True)) == {"cond": False, "uncond": True}


def test_samples_in_a_list_have_branches_and_forks():
    model = DiffusionModel(z_image())
    words, others = torch.ones(5, 16), -torch.ones(3, 16)
    asked = {"prompt_embeds": [words], "negative_prompt_embeds": [others], "guidance_scale": 4.0}
    small = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "latent"}
    whole = model.record(**asked, **small, seed=0, capture=["transformer:inputs"])
    assert [row.branches for row in whole.ledger] == [("cond", "uncond")] * 2
    (_, _, told), _ = whole.passages("transformer:inputs")[0].value
    assert torch.equal(told[0], words)
    assert torch.equal(whole.fork(1).latents, whole.latents)
    with pytest.raises(InputError, match=r"switched on or off.*cond\+uncond"):
        whole.fork(1, guidance_scale=0.0)


def test_embeddings_alone_tell_no_branch_but_the_denoiser_does():
    case = tiny.FAMILIES["stable-cascade"]
    pipeline = case.build()
    prior, decoder = pipeline.prior_pipe, pipeline.decoder_pipe
    given = prior("a red circle", num_inference_steps=1, height=64, width=64)
    asked = {"prompt_embeds": given.prompt_embeds, "prompt_embeds_pooled": given.prompt_embeds_pooled}
    negative = {f"negative_{name}": torch.zeros_like(each) for name, each in asked.items()}
    record = DiffusionModel(decoder).record(
        image_embeddings=given.image_embeddings,
        **asked,
        **negative,
        num_inference_steps=1,
        guidance_scale=3.0,
        capture=["decoder:inputs"],
    )
    assert record.ledger.branches == ("cond", "uncond")
    _, named = record.passages("decoder:inputs")[0].value
    row = record.ledger[0].rows("cond", 2)
    assert torch.equal(named["clip_text_pooled"][row], given.prompt_embeds_pooled)


def test_a_call_after_one_of_both_branches_is_a_further_way():
    model = DiffusionModel(tiny.sd3())
    asked = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.5, "guidance_scale": 3.0}
    record = model.record("a red circle", seed=0, num_inference_steps=6, max_sequence_length=8, **asked)
    both, further = ("uncond", "cond"), ("guide1",)
    assert [row.branches for row in record.ledger] == [both, both, further, both, further, both, both, both]
    assert record.ledger.steps == 6


def test_each_way_of_the_batch_is_what_its_name_says():
    """Put together by the formula of guidance by words and image, they give what the scheduler was handed."""
    pipeline = tiny.pix2pix()
    model = DiffusionModel(pipeline)
    told = {**tiny.WORDED, "image": tiny.picture(), "seed": 0, "image_guidance_scale": 2.0}
    record = model.record(**told, guidance_scale=5.0, capture=["unet"])
    for step in range(record.ledger.steps):
        way = {each: record.at("unet", step=step, branch=each) for each in ("cond", "image", "uncond")}
        words, image = way["cond"] - way["image"], way["image"] - way["uncond"]
        guided = way["uncond"] + 5.0 * words + 2.0 * image
        assert torch.allclose(record.noise_pred[record.ledger.last_tick(step)], guided, atol=1e-5)


def test_ways_that_nothing_tells_apart_are_numbered():
    branches, _ = encoded()
    assert named(branches, None, torch.zeros(3, 4, 8, 8)) == ("guide0", "guide1", "guide2")
    assert [branches.of("unet", (SAMPLE[:1],), {}, earlier) for earlier in range(3)] == [
        ("cond",),
        ("uncond",),
        ("guide2",),
    ]
