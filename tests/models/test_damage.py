"""Folders of which something is missing, cut short or wrong: one error with the part, its file, a way on."""

import json
import shutil
import socket

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, LoadError, UnknownNameError
from workbench.models.model import DiffusionModel

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
PARTS = pytest.mark.parametrize("part", WEIGHTS)
AGAIN = "Copy or download it again"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A saved pipeline; change copies of it only."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd1"
    tiny.sd1().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def latents(good):
    return made(DiffusionModel(good))


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def made(model):
    return as_bytes(model.record("a red circle", seed=0, num_inference_steps=1, output_type="latent").latents)


def refused(copy, said, *, error=LoadError, **options):
    """Check that a folder is refused, with its weights and, as the same, by its configurations alone."""
    for dispatch in (True, None):
        with pytest.raises(error, match=f"{copy}.*{said}") as caught:
            DiffusionModel(copy, dispatch=dispatch, **options)
        assert type(caught.value) is error


def without_weights(good, copy, said, latents):
    """Check that a folder opens and its weights do not; and that they do when the folder is mended."""
    model = DiffusionModel(copy)
    with pytest.raises(LoadError, match=f"{copy}.*{said}"):
        model.dispatch()
    assert not model.dispatched
    assert all(each.is_meta for each in model.components["unet"].parameters())
    with pytest.raises(LoadError, match=f"{copy}.*{said}"):
        DiffusionModel(copy, dispatch=True)
    shutil.copytree(good, copy, dirs_exist_ok=True)
    model.dispatch()
    assert made(model) == latents


# Weights


def header(content):
    return 8 + int.from_bytes(content[:8], "little")


PLACES = {
    "nothing": lambda content: 0,
    "length": lambda content: 4,
    "header": lambda content: header(content) // 2,
    "first number": lambda content: header(content) + 2,
    "last byte": lambda content: len(content) - 1,
}


@PARTS
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_weights_that_are_cut_short_are_refused_before_any_is_read(copy, part, place):
    file = copy / part / WEIGHTS[part]
    content = file.read_bytes()
    file.write_bytes(content[: place(content)])
    model = DiffusionModel(copy)
    with pytest.raises(LoadError, match=f"{file} cannot be read: .*{AGAIN}"):
        model.dispatch()
    assert not model.dispatched


@PARTS
def test_weights_that_were_cut_short_are_loaded_when_they_are_whole(good, copy, part, latents):
    file = copy / part / WEIGHTS[part]
    file.write_bytes(file.read_bytes()[:-1])
    without_weights(good, copy, f"{part}/{WEIGHTS[part]} cannot be read: .*{AGAIN}", latents)


@PARTS
def test_weights_that_are_not_there_are_missed(good, copy, part, latents):
    (copy / part / WEIGHTS[part]).unlink()
    said = f"{part} has no safetensors file, so {part} has no weights.*{AGAIN}"
    without_weights(good, copy, said, latents)


@PARTS
def test_a_weight_that_the_file_lacks_is_named(good, copy, part, latents):
    file = copy / part / WEIGHTS[part]
    weights = load_file(file)
    lost = sorted(weights)[-1]
    weights.pop(lost)
    save_file(weights, file, metadata={"format": "pt"})
    without_weights(good, copy, f"{part} lacks weights of {part}: {lost}.*{AGAIN}", latents)


@pytest.mark.parametrize("damage", ["lost", "index"])
def test_weights_in_shards_are_all_there_or_missed(tmp_path, damage, latents):
    for name in ("good", "copy"):
        tiny.sd1().save_pretrained(tmp_path / name, max_shard_size="100KB")
    copy, index = tmp_path / "copy", "diffusion_pytorch_model.safetensors.index.json"
    shard = sorted((copy / "unet").glob("*-0000?-of-*"))[1]
    if damage == "lost":
        shard.unlink()
        said = f"unet/{index} names {shard.name}, which is not there, so unet lacks weights.*{AGAIN}"
    else:
        (copy / "unet" / index).write_text('{"weight_map": {')
        said = f"unet/{index} cannot be read: .*{AGAIN}"
    without_weights(tmp_path / "good", copy, said, latents)


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
@pytest.mark.parametrize("kept", [0, 4, 0.5, -1])
def test_pickles_that_are_cut_short_are_an_error_of_ours_too(copy, part, name, kept):
    file = copy / part / WEIGHTS[part]
    torch.save(load_file(file), copy / part / name)
    file.unlink()
    content = (copy / part / name).read_bytes()
    (copy / part / name).write_bytes(content[: int(len(content) * kept) if kept == 0.5 else kept])
    with pytest.raises(LoadError, match=f"(?s){copy} could not be opened as a pipeline.*{name}"):
        DiffusionModel(copy, use_safetensors=False, dispatch=True)


def test_weights_are_missed_on_a_rank_too(good, copy, latents, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    file, scheme = copy / "unet" / WEIGHTS["unet"], {"unet": {"backend": "gloo"}}
    content = file.read_bytes()
    weights = load_file(file)
    lost = sorted(weights)[-1]
    weights.pop(lost)
    try:
        for damage, said in (
            (lambda: file.write_bytes(content[:-1]), f"{file} cannot be read: .*{AGAIN}"),
            (lambda: save_file(weights, file), f"{copy / 'unet'} lacks the weight {lost}"),
            (file.unlink, f"{copy / 'unet'} has no safetensors file"),
        ):
            damage()
            with pytest.raises(LoadError, match=said):
                DiffusionModel.from_pretrained(copy, parallel_scheme=scheme, device="cpu")
        shutil.copytree(good, copy, dirs_exist_ok=True)
        model = DiffusionModel.from_pretrained(copy, parallel_scheme=scheme, device="cpu")
        assert made(model) == latents
    finally:
        dist.destroy_process_group()


# The index


def change(copy, **entries):
    path = copy / "model_index.json"
    index = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: entry for name, entry in index.items() if entry is not Ellipsis}))


@pytest.mark.parametrize(
    ("named", "error", "said"),
    [
        (..., LoadError, r"model_index.json names no pipeline class \(_class_name\)"),
        (
            "NoSuchPipeline",
            UnknownNameError,
            "model_index.json: diffusers has no pipeline 'NoSuchPipeline'.*Did",
        ),
        ("StableDifusionPipeline", UnknownNameError, "Did you mean 'StableDiffusionPipeline'"),
        (
            "UNet2DConditionModel",
            LoadError,
            "model_index.json names UNet2DConditionModel, which is no pipeline",
        ),
        (3, UnknownNameError, "model_index.json: diffusers has no pipeline '3'"),
        (None, UnknownNameError, "model_index.json: diffusers has no pipeline 'None'"),
    ],
)
def test_a_pipeline_class_that_there_is_not_is_named(copy, named, error, said):
    change(copy, _class_name=named)
    refused(copy, said, error=error)


@pytest.mark.parametrize(
    ("part", "library"),
    [
        ("unet", "diffusers"),
        ("text_encoder", "transformers"),
        ("scheduler", "diffusers"),
        ("tokenizer", "transformers"),
        ("unet", "stable_diffusion"),
    ],
)
def test_a_parts_class_that_there_is_not_is_named(copy, part, library):
    change(copy, **{part: [library, "NoSuchClass"]})
    refused(copy, rf"model_index.json: {part} is a {library}\.NoSuchClass, which cannot be imported.*{part}=")


def test_a_part_of_a_library_that_nobody_knows_is_not_imported(copy):
    change(copy, unet=["antigravity", "UNet"])
    with pytest.raises(
        LoadError, match=r"unet is of no class of diffusers or transformers.*trust_remote_code"
    ):
        DiffusionModel(copy)
    with pytest.raises(LoadError, match="antigravity is not one of the libraries"):
        DiffusionModel(copy, dispatch=True)


@pytest.mark.parametrize("entry", [..., None, [None, None], "UNet", ["diffusers"], ["diffusers", 3], []])
def test_a_part_that_the_index_does_not_tell_is_asked_for(copy, entry):
    change(copy, unet=entry)
    refused(copy, rf"model_index.json: unet is .*, and a StableDiffusionPipeline needs one: .*{AGAIN}")
    for dispatch in (True, None) if entry in (..., [None, None]) else ():
        mine = tiny.sd1().unet
        assert DiffusionModel(copy, dispatch=dispatch, unet=mine).components["unet"] is mine


# Configurations


@pytest.mark.parametrize("part", [*CONFIGS, "tokenizer"])
def test_a_part_that_is_not_there_is_missed(copy, part):
    shutil.rmtree(copy / part)
    refused(copy, rf"{part} has no.*{part}.*{AGAIN}")


@pytest.mark.parametrize("part", CONFIGS)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "cannot be read"),
        (b'{"_class_name"', "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "is no JSON object"),
        (b"3", "is no JSON object"),
        (b"{}", "names no class for {part}"),
        (b'{"sample_size": 8}', "names no class for {part}"),
        (None, "has no {file}, so there is no {part}"),
    ],
)
def test_a_configuration_that_says_no_class_is_refused(copy, part, text, said):
    file = copy / part / CONFIGS[part]
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text)
    refused(copy, rf"{part}.*{said.format(part=part, file=file.name)}.*{AGAIN}")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_tokenizer_that_is_cut_short_is_an_error_of_ours(copy, text):
    (copy / "tokenizer" / "tokenizer.json").write_text(text)
    refused(copy, "")


def test_a_tokenizer_without_words_is_not_made_up(copy):
    (copy / "tokenizer" / "tokenizer.json").unlink()
    refused(copy, rf"tokenizer has none of tokenizer's files \(.*tokenizer\.json.*\).*{AGAIN}")


def test_parts_may_lie_beside_the_index(tmp_path):
    pipeline = tiny.ddpm()
    pipeline.save_pretrained(tmp_path)
    for name in ("unet", "scheduler"):
        for file in (tmp_path / name).iterdir():
            file.rename(tmp_path / file.name)
        (tmp_path / name).rmdir()
    model, live = DiffusionModel(tmp_path), DiffusionModel(pipeline)
    assert not model.dispatched
    assert model.memory() == live.memory()
    runs = [each.record(seed=0, num_inference_steps=2, output_type="np") for each in (model, live)]
    torch.testing.assert_close(runs[0].latents, runs[1].latents)


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "error", "said"),
    [
        ("float17", UnknownNameError, "torch has no dtype 'float17'.*'float16'"),
        ("torch.half_float", UnknownNameError, "torch has no dtype 'torch.half_float'"),
        (torch.int8, InputError, "torch.int8 is no dtype for weights"),
        (16, InputError, "16 is no dtype for weights"),
        ({"unet": "float17"}, UnknownNameError, "dtype of unet: torch has no dtype 'float17'"),
        ({"default": "float17"}, UnknownNameError, "dtype of default: torch has no dtype 'float17'"),
        ({"unet": torch.int64}, InputError, "dtype of unet: torch.int64 is no dtype for weights"),
        ({"unett": torch.float16}, UnknownNameError, "has no component 'unett'.*'unet'"),
    ],
)
def test_a_dtype_that_there_is_not_is_refused_before_anything_is_read(good, dtype, error, said):
    for dispatch in (True, None):
        with pytest.raises(error, match=said) as caught:
            DiffusionModel(good, dispatch=dispatch, dtype=dtype)
        assert type(caught.value) is error
