"""What a pipeline can do besides running, reached from the model that holds it."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.models.attention_processor import XFormersAttnProcessor
from PIL import Image

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import GuardError, InputError, UnknownNameError
from workbench.models.model import DiffusionModel

PROMPT = "a red circle"
ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-sd1"
    tiny.sd1().save_pretrained(path)
    return path


def made(model, **arguments):
    return as_bytes(model.record(PROMPT, seed=1, num_inference_steps=2, **arguments).images)


def near(model, before):
    now = model.record(PROMPT, seed=1, num_inference_steps=2, output_type="np").images
    return np.abs(now - before).max() < 1e-4


@pytest.mark.parametrize(("safe", "variant"), [(True, None), (True, "fp16"), (False, None)])
def test_saved_model_opens_and_makes_the_same(model, tmp_path, safe, variant):
    model.save_pretrained(tmp_path, safe_serialization=safe, variant=variant)
    ending = "safetensors" if safe else "bin"
    names = {file.name for file in (tmp_path / "unet").iterdir()}
    middle = "" if variant is None else f".{variant}"
    assert names == {"config.json", f"diffusion_pytorch_model{middle}.{ending}"}
    # transformers writes safetensors whatever it is told, so of the two kinds each part has its own.
    again = DiffusionModel(tmp_path, variant=variant, use_safetensors=safe)
    assert made(again) == made(model)


def test_numbers_become_pictures(model):
    (picture,) = model.numpy_to_pil(np.full((1, 4, 5, 3), 0.5))
    assert isinstance(picture, Image.Image)
    assert picture.size == (5, 4)


def test_parts_make_a_second_pipeline_without_new_memory(model):
    parts = model.pipeline.components
    for kind in (StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline):
        second = DiffusionModel(kind(**parts))
        for name, part in model.components.items():
            assert second.components[name] is part
        picture = Image.new("RGB", (32, 32), "red")
        masked = {"mask_image": picture} if "Inpaint" in kind.__name__ else {}
        assert second.record(
            PROMPT, image=picture, strength=0.9, num_inference_steps=2, seed=0, **masked
        ).images


def test_moving_and_casting_answer_with_the_model(model):
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.to(torch.float64) is model
    assert model.dtype == torch.float64
    assert next(model.unet.module.parameters()).dtype == torch.float64


def test_asking_for_a_method_loads_the_weights_and_the_device_does_not(folder):
    model = DiffusionModel(folder)
    assert model.device == torch.device("meta")
    assert not model.dispatched
    model.set_progress_bar_config(disable=True)
    assert model.dispatched
    assert model.device == torch.device("cpu")


def test_progress_bar_is_switched_off_and_on(model, capfd):
    for disable in (True, False):
        model.set_progress_bar_config(disable=disable)
        model.pipeline(PROMPT, num_inference_steps=2)
        assert ("2/2" in capfd.readouterr().err) is not disable


@pytest.mark.parametrize("size", ["auto", "max", 1])
def test_slices_and_off_again(model, size):
    before = model.record(PROMPT, seed=1, num_inference_steps=2, output_type="np").images
    whole = made(model)
    model.enable_attention_slicing(size)
    assert (
        "Sliced"
        in type(model.unet.module.mid_block.attentions[0].transformer_blocks[0].attn1.processor).__name__
    )
    assert near(model, before)
    with pytest.raises(GuardError, match="disable_attention_slicing"):
        model.record(PROMPT, num_inference_steps=1, capture=[f"{ATTENTION}:query"])
    model.disable_attention_slicing()
    assert made(model) == whole


def test_memory_efficient_attention_wins_over_slices(model):
    attention = model.unet.module.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.set_processor(XFormersAttnProcessor())
    with pytest.warns(UserWarning, match="unet: memory-efficient attention is on"):
        model.enable_attention_slicing()
    assert isinstance(attention.processor, XFormersAttnProcessor)
    model.disable_attention_slicing()
    assert isinstance(attention.processor, XFormersAttnProcessor)
    others = [each for each in model.unet.module.attn_processors.values() if each is not attention.processor]
    assert not any("Sliced" in type(each).__name__ for each in others)


def test_slices_are_taken_away_where_there_are_some(model):
    layers = model.unet.module.attn_processors
    model.enable_attention_slicing(1)
    model.enable_attention_slicing(None)
    assert not any("Sliced" in type(each).__name__ for each in model.unet.module.attn_processors.values())
    model.unet.module.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(
        XFormersAttnProcessor()
    )
    model.enable_attention_slicing(None)
    kinds = [type(each).__name__ for each in model.unet.module.attn_processors.values()]
    assert kinds.count("XFormersAttnProcessor") == 1
    assert len(kinds) == len(layers)


@pytest.mark.parametrize("size", [0, -1, "huge", 1.5, True])
def test_a_size_that_slices_cannot_have_is_refused(model, size):
    with pytest.raises(InputError, match="is no size"):
        model.enable_attention_slicing(size)


def test_attention_backend_is_chosen_and_traced():
    case = tiny.CASES["flux"]
    model = DiffusionModel(case.build())
    settings = {**case.arguments, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    before = model.record(**settings).latents
    model.transformer.module.set_attention_backend("_native_math")
    attention = model.transformer.module.transformer_blocks[0].attn
    assert "NATIVE_MATH" in str(attention.processor._attention_backend).upper()
    record = model.record(capture=["transformer.transformer_blocks.0.attn:query"], **settings)
    torch.testing.assert_close(record.latents, before, rtol=1e-4, atol=1e-4)
    assert record.passages("transformer.transformer_blocks.0.attn:query")


def test_tiles_and_slices_of_the_decoder(model):
    whole = made(model)
    model.enable_vae_tiling()
    model.enable_vae_slicing()
    assert model.vae.module.use_tiling
    assert model.vae.module.use_slicing
    record = model.record(PROMPT, seed=1, num_inference_steps=2, capture=["vae.decode"])
    assert record.fork(1).images[0].tobytes() == record.images[0].tobytes()
    model.disable_vae_tiling()
    model.disable_vae_slicing()
    assert made(model) == whole


def test_offloaded_parts_are_traced(model):
    whole = made(model)
    model.enable_model_cpu_offload(device="cpu")
    assert hasattr(model.unet.module, "_hf_hook")
    assert made(model, capture=["unet.mid_block"]) == whole
    model.remove_all_hooks()
    assert made(model) == whole


def test_memory_is_told_by_dtype_with_and_without_weights(model, folder):
    parameters = list(model.unet.module.parameters())
    told = model.memory()
    assert told["unet"]["float32"] == sum(each.nbytes for each in parameters)
    assert told["unet"]["float16"] * 2 == told["unet"]["float32"]
    lazy = DiffusionModel(folder)
    assert lazy.memory()["unet"] == told["unet"]
    assert not lazy.dispatched


@pytest.mark.parametrize("name", ["from_pipe", "download", "save_pretraind"])
def test_what_makes_another_pipeline_and_what_is_not_there_are_refused(model, name):
    with pytest.raises(UnknownNameError, match=f"no component or method '{name}'"):
        getattr(model, name)


def test_what_is_no_pipeline_has_a_device_and_no_slices(folder):
    spec = {"transformer_cls": "UNet2DConditionModel", "subfolder": "unet"}
    alone = DiffusionModel.from_config(folder, spec)
    assert alone.device == torch.device("cpu")
    with pytest.raises(UnknownNameError, match="it is no pipeline"):
        alone.enable_attention_slicing()


def test_names_are_offered(model):
    assert {"save_pretrained", "enable_vae_tiling", "unet", "memory"} <= set(dir(model))
