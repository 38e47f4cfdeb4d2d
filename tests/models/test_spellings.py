"""Code written against nnsight's DiffusionModel runs with the import changed."""

import diffusers
import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench import Diffuser, DiffusionModel, zoo
from workbench.errors import InputError, UnknownNameError


@pytest.fixture(scope="module")
def sd():
    return DiffusionModel("shapes-unet", automodel="StableDiffusionPipeline")


def test_automodel_names_the_class_that_opens(sd):
    assert sd.automodel is diffusers.StableDiffusionPipeline
    assert DiffusionModel("shapes-unet").automodel is diffusers.StableDiffusionPipeline
    image = DiffusionModel(str(zoo.path("shapes-unet")), automodel=diffusers.StableDiffusionImg2ImgPipeline)
    assert isinstance(image.pipeline, diffusers.StableDiffusionImg2ImgPipeline)


def test_what_is_no_pipeline_class_is_refused():
    with pytest.raises(UnknownNameError, match=r"'StableDifusionPipeline'.*'StableDiffusionPipeline'"):
        DiffusionModel("shapes-unet", automodel="StableDifusionPipeline")
    with pytest.raises(InputError, match="opens no pipeline"):
        DiffusionModel("shapes-unet", automodel=torch.Tensor([1]))


def test_every_step_by_iter(sd):
    seen = []
    with sd.generate("a red circle", num_inference_steps=4, seed=0) as tracer:
        for _ in tracer.iter[:]:
            denoiser_out = sd.unet.output.save()
            seen.append(denoiser_out[0])
    record = sd.record("a red circle", num_inference_steps=4, seed=0, capture=["unet:output[0]"])
    assert as_bytes(torch.stack(seen)) == as_bytes(record["unet:output[0]"])


def test_trace_is_one_step_and_so_is_a_plain_call():
    flux = DiffusionModel(tiny.flux())
    settings = {**tiny.CASES["flux"].arguments}
    del settings["num_inference_steps"], settings["prompt"]
    with flux.trace("a red circle", seed=0, **settings) as tracer:
        denoiser_out = flux.transformer.output.save()
    assert len(tracer.ledger) == 1
    assert denoiser_out[0].ndim == 3
    assert as_bytes(flux("a red circle", seed=0, **settings).images) == as_bytes(tracer.images)


def test_a_list_of_prompts_is_a_batch(sd):
    with sd.trace(["a red circle", "a blue square"], seed=0) as tracer:
        assert sd.unet.output[0].shape[0] == 4
    assert len(tracer.images) == 2


def test_what_was_saved_is_not_changed_by_a_later_edit(sd):
    with sd.trace("a red circle", seed=0):
        hidden = sd.unet.mid_block.output
        kept = hidden.save()
        hidden[:] = 0
    assert kept.any()


def test_modules_and_tokenizers_are_attributes(sd):
    assert sd.tokenizer is sd.pipeline.tokenizer
    assert {"unet", "vae", "text_encoder", "tokenizer"} <= set(dir(sd))


@pytest.mark.parametrize("given", ["class", "object"])
def test_a_diffuser_is_the_plain_pipeline(given, sd):
    built = (
        Diffuser(diffusers.StableDiffusionPipeline, "shapes-unet")
        if given == "class"
        else Diffuser(sd.pipeline)
    )
    assert isinstance(built.pipeline, diffusers.StableDiffusionPipeline)
    made = built.generate("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert as_bytes(made.images) == as_bytes(sd.record("a red circle", num_inference_steps=2, seed=0).images)


def test_a_diffuser_of_a_class_needs_something_to_open():
    with pytest.raises(InputError, match="takes one folder"):
        Diffuser(diffusers.StableDiffusionPipeline)
    with pytest.raises(InputError, match="nothing to open"):
        Diffuser(tiny.sd1(), "shapes-unet")
