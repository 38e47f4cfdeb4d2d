"""Configuration and random weights: what a spec builds, and what it refuses."""

import json
import shutil

import pytest
import torch

import workbench as wb
from tests import tiny
from workbench.errors import InputError, LoadError, UnknownNameError

UNET = {"transformer_cls": "UNet2DConditionModel", "subfolder": "unet"}
FLUX = {"transformer_cls": "FluxTransformer2DModel"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"sd1": tiny.sd1(), "flux": tiny.CASES["flux"].build()}
    for name, pipeline in made.items():
        pipeline.save_pretrained(tmp_path_factory.getbasetemp() / name)
    return {name: tmp_path_factory.getbasetemp() / name for name in made}


def weights(model, name="unet"):
    return torch.cat([each.flatten().float() for each in model.components[name].state_dict().values()])


@pytest.mark.parametrize(("name", "spec"), [("sd1", UNET), ("flux", FLUX)])
def test_a_whole_pipeline_around_random_weights_is_traced_like_any(folders, name, spec):
    part = spec.get("subfolder", "transformer")
    model = wb.DiffusionModel.from_config(folders[name], {**spec, "load_full_pipeline": True}, seed=0)
    opened = wb.DiffusionModel(folders[name], dispatch=True)
    assert {key: type(each) for key, each in model.components.items()} == {
        key: type(each) for key, each in opened.components.items()
    }
    assert weights(model, part).shape == weights(opened, part).shape
    assert not torch.equal(weights(model, part), weights(opened, part))
    assert torch.equal(weights(model, "vae"), weights(opened, "vae"))
    arguments = tiny.CASES[name].arguments
    record = model.record(**arguments, seed=0, capture=[tiny.CASES[name].site])
    assert record.images
    assert record.ledger.steps == arguments["num_inference_steps"]
    assert record[tiny.CASES[name].site].abs().max() > 0


def test_a_seed_makes_the_same_weights_and_leaves_torchs_own_noise(folders):
    torch.manual_seed(5)
    expected = torch.randn(4)
    torch.manual_seed(5)
    one, two = (wb.DiffusionModel.from_config(folders["sd1"], UNET, seed=3) for _ in range(2))
    assert torch.equal(torch.randn(4), expected)
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(wb.DiffusionModel.from_config(folders["sd1"], UNET, seed=4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
@pytest.mark.parametrize("low", [True, False])
def test_weights_are_in_the_dtype_that_is_asked_for(folders, dtype, low):
    model = wb.DiffusionModel.from_config(
        folders["sd1"], {**UNET, "low_cpu_mem_usage": low, "load_full_pipeline": True}, dtype=dtype
    )
    assert {part.dtype for part in (model.pipeline.unet, model.pipeline.vae)} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_gradient_checkpointing_is_on_unless_told_otherwise(folders):
    on = wb.DiffusionModel.from_config(folders["sd1"], UNET)
    off = wb.DiffusionModel.from_config(folders["sd1"], {**UNET, "enable_gradient_checkpointing": False})
    assert [each.components["unet"].is_gradient_checkpointing for each in (on, off)] == [True, False]


def test_a_denoiser_alone_has_its_tree_and_runs_in_a_loop_of_ones_own(folders):
    model = wb.DiffusionModel.from_config(folders["sd1"], UNET, seed=0)
    assert list(model.components) == ["unet"]
    assert model.unet.mid_block.module is model.components["unet"].mid_block
    with pytest.raises(InputError, match=r"only unet.*load_full_pipeline=True.*trace_loop"):
        model.record("a red circle")
    scheduler = wb.DiffusionModel(folders["sd1"]).pipeline.scheduler
    words, sample = torch.zeros(1, 24, tiny.WIDTH), torch.randn(1, 4, 8, 8)
    parts = {"scheduler": scheduler}
    with model.trace_loop(components=parts, capture=["unet.mid_block"]) as run, torch.no_grad():
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            noise = model.components["unet"](sample, t, words).sample
            sample = scheduler.step(noise, t, sample).prev_sample
    assert torch.equal(run.latents[-1], sample)
    assert len(run.record["unet.mid_block"]) == 3


def test_the_whole_pipeline_is_opened_with_every_check_of_its_options(folders, tmp_path):
    whole = {**UNET, "load_full_pipeline": True}
    copy = shutil.copytree(folders["sd1"], tmp_path / "copy")
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tiny.sd1().vae.state_dict(), copy / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(LoadError, match="use_safetensors=False"):
        wb.DiffusionModel.from_config(copy, whole)
    with pytest.raises(UnknownNameError, match="nonsense"):
        wb.DiffusionModel.from_config(folders["sd1"], whole, nonsense=3)
    with pytest.raises(InputError, match="variant is for a whole pipeline"):
        wb.DiffusionModel.from_config(folders["sd1"], UNET, variant="fp16")
    with pytest.raises(InputError, match="as dtype= only"):
        wb.DiffusionModel.from_config(folders["sd1"], whole, torch_dtype=torch.float16)
    with pytest.raises(InputError, match="trust_remote_code=True"):
        wb.DiffusionModel.from_config(folders["sd1"], whole, custom_pipeline="lpw_stable_diffusion")


def test_a_denoiser_alone_needs_no_more_than_its_configuration(folders, tmp_path):
    (tmp_path / "unet").mkdir()
    shutil.copy(folders["sd1"] / "unet" / "config.json", tmp_path / "unet")
    assert list(wb.DiffusionModel.from_config(tmp_path, UNET).components) == ["unet"]


def test_a_spec_can_be_a_file_and_part_of_a_larger_one(folders, tmp_path):
    plain, nested = tmp_path / "spec.yaml", tmp_path / "recipe.yaml"
    plain.write_text("transformer_cls: UNet2DConditionModel\nsubfolder: unet\n")
    nested.write_text("model:\n  lr: 1\npipeline_spec: " + json.dumps(UNET))
    for file in (plain, str(nested)):
        assert list(wb.DiffusionModel.from_config(folders["sd1"], file).components) == ["unet"]
    assert wb.PipelineSpec.from_dict({**UNET, "pipeline_cls": None}).pipeline_cls is None
    with pytest.raises(InputError, match="read from a dict"):
        wb.PipelineSpec.from_dict(None)
    assert wb.PipelineSpec.read(plain) == wb.PipelineSpec(**UNET) == wb.PipelineSpec.from_dict(UNET)


@pytest.mark.parametrize(
    ("spec", "error", "said"),
    [
        ({}, ValueError, "needs transformer_cls"),
        ({**UNET, "subfolder": ""}, InputError, "needs subfolder"),
        ({**UNET, "transformer": 1, "sub": 2}, InputError, "has no 'transformer', 'sub'.*Its keys are"),
        ({**UNET, "load_full_pipeline": "yes"}, InputError, "load_full_pipeline='yes'.*boolean"),
        ({"transformer_cls": "FluxTransformer"}, UnknownNameError, "FluxTransformer2DModel"),
        ({"transformer_cls": "DDIMScheduler"}, UnknownNameError, "no model 'DDIMScheduler'"),
        ({"transformer_cls": "UNet2DConditionModel"}, LoadError, "its transformer could not be built"),
        ({**UNET, "pipeline_cls": "NoPipeline", "load_full_pipeline": True}, UnknownNameError, "NoPipeline"),
        ("nowhere.yaml", InputError, "nowhere.yaml cannot be read"),
        (7, InputError, "not 7"),
        (None, InputError, "not None"),
    ],
)
def test_what_is_no_spec_is_said_by_name(folders, spec, error, said):
    with pytest.raises(error, match=said):
        wb.DiffusionModel.from_config(folders["sd1"], spec)
    if isinstance(spec, dict) and error is InputError and spec["subfolder"]:
        with pytest.raises(InputError, match=said):
            wb.PipelineSpec(**spec)


@pytest.mark.parametrize(
    ("dtype", "error", "said"),
    [("float17", UnknownNameError, "'float17'.*float1"), (torch.int8, InputError, "no dtype for weights")],
)
def test_a_dtype_that_weights_cannot_have_is_refused(folders, dtype, error, said):
    with pytest.raises(error, match=said):
        wb.DiffusionModel.from_config(folders["sd1"], UNET, dtype=dtype)
