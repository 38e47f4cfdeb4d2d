"""Options of ``from_pretrained``: each reaches what it is for; what is unsafe must be asked for by name."""

import json
import pickle
import shutil
from contextlib import suppress

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests import tiny
from tests.beside import needs_beside, run_beside
from workbench.errors import InputError, LoadError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.models.options import renamed


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved pipeline; change copies of it only."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd1"
    tiny.sd1().save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def opened(reference, **options):
    return DiffusionModel(reference, dispatch=True, **options)


# Names of before


@pytest.mark.parametrize("option", ["mirror", "resume_download", "proxies"])
def test_an_option_without_effect_warns_and_opens(saved, option):
    with pytest.warns(UserWarning, match=f"{option} has no effect any more"):
        assert opened(saved, **{option: True}).dispatched


def test_a_renamed_option_keeps_its_meaning(saved):
    assert renamed({"use_auth_token": "secret", "torch_dtype": 1}) == {"token": "secret", "dtype": 1}
    assert opened(saved, use_auth_token="secret").dispatched
    with pytest.raises(InputError, match="use_auth_token and token are the same"):
        opened(saved, use_auth_token="secret", token="other")


def test_what_returns_more_than_a_model_is_asked_of_from_pretrained(saved):
    for option in ("return_cached_folder", "output_loading_info"):
        with pytest.raises(InputError, match=r"DiffusionModel\.from_pretrained"):
            opened(saved, **{option: True})
    model, folder = DiffusionModel.from_pretrained(saved, return_cached_folder=True)
    assert folder == saved
    assert model.dispatched
    assert DiffusionModel.from_pretrained(saved).reference == str(saved)


def test_loading_info_names_what_the_files_lack_and_have_too_many(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["stranger"] = weights.pop("conv_out.bias")
    save_file(weights, file)
    _, info = DiffusionModel.from_pretrained(folder, output_loading_info=True)
    assert info["unet"] == {"missing_keys": ["conv_out.bias"], "unexpected_keys": ["stranger"]}
    assert info["vae"] == {"missing_keys": [], "unexpected_keys": []}


def test_tied_weights_are_not_missing(tmp_path):
    tiny.CASES["flux"].build().save_pretrained(tmp_path)
    _, info = DiffusionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert "text_encoder_2" in info
    assert all(each == {"missing_keys": [], "unexpected_keys": []} for each in info.values())


def test_a_class_that_chooses_another_takes_its_own_options(saved):
    model = opened(saved, automodel="AutoPipelineForText2Image", enable_pag=True)
    assert model.automodel.__name__ == "StableDiffusionPAGPipeline"


# Dtypes and files


def test_auto_is_the_dtype_of_the_weights(tmp_path):
    pipeline = tiny.sd1()
    pipeline.unet.half()
    pipeline.text_encoder.to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    model = opened(tmp_path, torch_dtype="auto")
    assert model.pipeline.unet.dtype == torch.float16
    assert model.pipeline.text_encoder.dtype == torch.bfloat16
    assert model.pipeline.vae.dtype == torch.float32
    assert opened(tmp_path).pipeline.unet.dtype == torch.float32


def test_a_dtype_for_each_component(saved):
    model = opened(saved, dtype={"unet": "float16", "default": torch.float64})
    assert model.pipeline.unet.dtype == torch.float16
    assert model.pipeline.vae.dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"torch_dtype": "float17"}, UnknownNameError, "no dtype 'float17'"),
        ({"dtype": {"unet": "half16"}}, UnknownNameError, "no dtype 'half16'"),
        ({"dtype": torch.int64}, InputError, "no dtype for weights"),
        ({"dtype": "float16", "torch_dtype": "float16"}, InputError, "torch_dtype and dtype are the same"),
        ({"torch_dtyp": torch.float16}, UnknownNameError, "takes no option 'torch_dtyp'.*torch_dtype"),
        ({"variant": "fp16"}, LoadError, "fp16"),
        ({"device_map": "somehow"}, LoadError, "somehow"),
        ({"quantization_config": 8}, LoadError, "PipelineQuantizationConfig"),
    ],
)
def test_what_an_option_cannot_be_is_said(saved, options, error, said):
    with pytest.raises(error, match=said):
        opened(saved, **options)


@needs_beside
def test_quantised_weights_are_traced_and_captured():
    assert "1 passed" in run_beside("tests/models/quantised.py")


def test_a_variant_is_opened(folder):
    pipeline = tiny.sd1().to(torch.float16)
    pipeline.save_pretrained(folder, variant="fp16")
    for options in ({}, {"variant": "fp16"}):
        found = opened(folder, torch_dtype="auto", **options)
        assert found.pipeline.unet.dtype == (torch.float16 if options else torch.float32)


# Without memory mapping, diffusers leaves the file of each component to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": False},
        {"disable_mmap": True},
        {"local_files_only": True},
        {"device_map": "cpu"},
        {"use_safetensors": None},
    ],
)
def test_options_of_loading_go_through(saved, options):
    assert opened(saved, **options).record("a red circle", num_inference_steps=1, seed=0).images


def test_a_map_of_devices_spreads_a_pipeline(saved):
    model = opened(saved, device_map="cpu")
    assert model.pipeline.hf_device_map == "cpu"


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"trust_remote_code": True}])
def test_weights_that_are_missing_are_not_made_up_under_any_option(folder, options):
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights.pop(next(key for key in weights if key.endswith("mlp.fc1.weight")))
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"lacks weights of text_encoder: .*mlp.fc1.weight"):
        opened(folder, **options)


def test_weights_of_another_shape_are_said_with_their_part(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_in.bias"] = torch.zeros(7)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(LoadError, match=r"conv_in.bias of unet is \(7,\), and by its configuration \("):
        opened(folder)


def test_what_loads_no_weights_cannot_move_them(saved):
    for asked in ({"device": "cpu"}, {"output_loading_info": True}, {"load_for_training": True}):
        with pytest.raises(InputError, match="dispatch=False loads no weights"):
            DiffusionModel.from_pretrained(saved, dispatch=False, **asked)
    assert not DiffusionModel.from_pretrained(saved, dispatch=False).dispatched


def test_loading_info_and_a_device_go_together(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("conv_in.bias")
    save_file(weights, file, metadata={"format": "pt"})
    _, info = DiffusionModel.from_pretrained(folder, output_loading_info=True, move_to_device=False)
    assert info["unet"]["missing_keys"] == ["conv_in.bias"]


def test_components_can_be_given_and_left_out(saved):
    unet, scheduler = tiny.sd1().unet, DDPMScheduler()
    model = opened(saved, unet=unet, scheduler=scheduler, safety_checker=None)
    assert model.pipeline.unet is unet
    assert model.pipeline.scheduler is scheduler
    assert "safety_checker" not in model.components


def test_a_hub_id_is_found_in_the_cache_without_a_network(saved, tmp_path):
    home = tmp_path / "models--somebody--tiny"
    for revision, commit in (("main", "a" * 40), ("second", "b" * 40)):
        shutil.copytree(saved, home / "snapshots" / commit)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(commit)
    (home / "snapshots" / ("b" * 40) / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "DDPMScheduler", "num_train_timesteps": 7}'
    )
    offline = {"cache_dir": tmp_path, "local_files_only": True}
    model, folder = DiffusionModel.from_pretrained("somebody/tiny", return_cached_folder=True, **offline)
    assert model.reference == "somebody/tiny"
    assert folder == home / "snapshots" / ("a" * 40)
    second = opened("somebody/tiny", revision="second", **offline)
    assert second.pipeline.scheduler.config.num_train_timesteps == 7
    assert opened("somebody/tiny", torch_dtype="auto", **offline).pipeline.unet.dtype == torch.float32


# What could run code


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_pickled_weights_are_opened_only_when_asked_for(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tiny.sd1().unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(LoadError, match=r"unet has its weights as a pickle.*use_safetensors=False"):
        opened(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tiny.sd1().vae.state_dict(), folder / "vae" / "diffusion_pytorch_model.bin")
    (folder / "text_encoder" / "model.safetensors").unlink()
    torch.save(tiny.sd1().text_encoder.state_dict(), folder / "text_encoder" / "pytorch_model.bin")
    model = opened(folder, use_safetensors=False)
    assert model.record("a red circle", num_inference_steps=1, seed=0).images


def test_one_part_may_be_pickled(folder):
    latents = opened(folder).record("a red circle", num_inference_steps=1, seed=0).latents
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tiny.sd1().unet.state_dict(), folder / "unet" / "diffusion_pytorch_model.bin")
    model = opened(folder, use_safetensors=False)
    assert torch.equal(model.record("a red circle", num_inference_steps=1, seed=0).latents, latents)
    with pytest.raises(LoadError, match="use_safetensors=False"):
        opened(folder, use_safetensors=None)


def test_a_hostile_pickle_leaves_no_mark(folder, tmp_path):
    mark = tmp_path / "mark"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    file = folder / "unet" / "diffusion_pytorch_model.bin"
    file.write_bytes(pickle.dumps(Payload(mark)))
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises(LoadError):
            opened(folder, **options)
    tiny.sd1().save_pretrained(folder, safe_serialization=False)
    for safe in (*folder.glob("unet/*.safetensors"), *folder.glob("*/model.safetensors")):
        safe.unlink()
    file.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(LoadError, match=r"weights_only|Weights only|pickle"):
        opened(folder, use_safetensors=False)
    assert not mark.exists()
    # Control: unpickled without care, it leaves its mark.
    pickle.loads(file.read_bytes()).close()
    assert mark.exists()


OWN_CODE = """
from pathlib import Path
from diffusers import StableDiffusionPipeline

Path({mark!r}).touch()


class OwnPipeline(StableDiffusionPipeline):
    pass
"""


def test_code_from_elsewhere_runs_only_when_asked_for(saved, tmp_path):
    mark, own = tmp_path / "mark", tmp_path / "own"
    own.mkdir()
    (own / "pipeline.py").write_text(OWN_CODE.format(mark=str(mark)))
    for custom in (str(own), "somebody/pipeline", "lpw_stable_diffusion"):
        with pytest.raises(InputError, match=r"custom_pipeline=.*trust_remote_code=True"):
            opened(saved, custom_pipeline=custom)
    assert not mark.exists()
    model = opened(saved, custom_pipeline=str(own), trust_remote_code=True)
    assert mark.exists()
    assert model.automodel.__name__ == "OwnPipeline"
    assert model.record("a red circle", num_inference_steps=1, seed=0).images


@pytest.mark.parametrize(("revision", "where"), [(None, "main"), ("main", "main"), ("0.0.1", "v0.0.1")])
def test_a_community_pipeline_is_opened_by_its_name(saved, tmp_path, monkeypatch, revision, where):
    # Which versions there are, diffusers asks the package index.
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.get_diffusers_versions", lambda: ["0.0.1"])
    mark, home = tmp_path / "mark", tmp_path / "datasets--diffusers--community-pipelines-mirror"
    code = home / "snapshots" / ("c" * 40) / where
    code.mkdir(parents=True)
    (code / "somebodys.py").write_text(OWN_CODE.format(mark=str(mark)))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("c" * 40)
    options = {"custom_pipeline": "somebodys", "custom_revision": revision, "cache_dir": str(tmp_path)}
    with pytest.raises(InputError, match="trust_remote_code=True"):
        opened(saved, **options)
    assert not mark.exists()
    assert opened(saved, **options, trust_remote_code=True).automodel.__name__ == "OwnPipeline"
    assert mark.exists()


def test_a_part_that_brings_code_is_not_asked_about(folder, tmp_path, monkeypatch):
    """transformers would ask at the keyboard whether to run it."""
    mark, index = tmp_path / "mark", json.loads((folder / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "AutoTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    own = {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "tokenizer" / "own.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for dispatch in (True, None):
        with suppress(LoadError, InputError):
            DiffusionModel(folder, dispatch=dispatch)
        assert not mark.exists()
    # Control: transformers asks, is told yes, and runs it.
    with suppress(Exception):
        AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert mark.exists()


def test_a_folder_with_code_of_its_own_is_opened_only_when_asked_for(folder, tmp_path):
    mark, index = tmp_path / "mark", folder / "model_index.json"
    (folder / "pipeline.py").write_text(OWN_CODE.format(mark=str(mark)))
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '["pipeline", "OwnPipeline"]'))
    with pytest.raises(InputError, match=r"Python code of its own.*trust_remote_code=True"):
        opened(folder)
    with pytest.raises(InputError, match=r"dispatch=False reads configurations only, and code of .*Leave"):
        DiffusionModel(folder, dispatch=False, trust_remote_code=True)
    assert not mark.exists()
    assert opened(folder, trust_remote_code=True).automodel.__name__ == "OwnPipeline"
    assert mark.exists()


def test_a_part_given_by_name_is_used_also_where_the_class_calls_it_optional(tmp_path):
    pipeline = tiny.CASES["wan"].build()
    pipeline.save_pretrained(tmp_path)
    mine = tiny.CASES["wan"].build().transformer
    assert opened(tmp_path, transformer=mine).components["transformer"] is mine
    assert "transformer" not in opened(tmp_path, transformer=None).components
