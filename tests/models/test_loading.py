import json
import shutil

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench import zoo
from workbench.errors import InputError, LoadError, UnknownNameError, WorkbenchError
from workbench.models.loading import load, locate
from workbench.models.model import DiffusionModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline; change copies of it only."""
    path = tmp_path_factory.mktemp("models") / "tiny-sd1"
    tiny.sd1().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_a_live_pipeline_is_used_as_it_is():
    pipeline = tiny.sd1()
    assert load(pipeline) == (pipeline, "")
    model = DiffusionModel(pipeline)
    assert model.pipeline is pipeline
    assert model.reference == ""


@pytest.mark.parametrize("spelled", [str, lambda path: path])
def test_a_folder_is_opened_by_text_or_path(folder, spelled):
    model = DiffusionModel(spelled(folder))
    assert model.reference == str(folder)
    live = DiffusionModel(tiny.sd1())
    runs = [each.record("a red circle", num_inference_steps=2, seed=0) for each in (model, live)]
    assert as_bytes(runs[0].latents) == as_bytes(runs[1].latents)


def test_options_go_to_the_pipeline(folder):
    model = DiffusionModel(folder, torch_dtype=torch.float64)
    model.dispatch()
    assert model.unet.dtype is torch.float64


def test_a_name_of_the_zoo_is_opened():
    for name in zoo.models():
        assert locate(name) == str(zoo.path(name))
        assert DiffusionModel(name).reference == name


def test_a_hub_id_is_left_to_the_hub():
    assert locate("owner/name") == "owner/name"


def test_a_hub_id_that_cannot_be_reached_is_an_error_of_ours():
    for dispatch in (True, None):
        with pytest.raises(LoadError, match="no-such-owner/no-such-model could not be fetched into"):
            DiffusionModel("no-such-owner/no-such-model", local_files_only=True, dispatch=dispatch)


@pytest.mark.parametrize(
    "name", ["shapes", "", "shapes-unett", "./nowhere", "/no/such/folder", "~/none", "a/b/c"]
)
def test_an_unknown_name_says_what_was_looked_for(name):
    with pytest.raises(UnknownNameError, match="no zoo model, no folder, no Hub id"):
        DiffusionModel(name)


@pytest.mark.parametrize("thing", [None, 3, [], {}, torch.nn.Linear(1, 1), tiny.sd1])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(InputError, match=r"is not a model. Give a zoo name"):
        DiffusionModel(thing)


def test_options_for_a_live_pipeline_are_refused():
    with pytest.raises(InputError, match="used as it is; torch_dtype cannot change it"):
        DiffusionModel(tiny.sd1(), torch_dtype=torch.float16)


def test_a_file_is_no_folder(folder):
    with pytest.raises(LoadError, match="is a file; give the folder"):
        DiffusionModel(folder / "model_index.json")


def test_an_empty_folder_is_no_pipeline(tmp_path):
    with pytest.raises(LoadError, match=r"no model_index.json, only nothing"):
        DiffusionModel(tmp_path)


def test_a_component_is_no_pipeline_and_what_lies_there_is_listed(folder):
    with pytest.raises(LoadError, match=r"no model_index\.json, only config\.json"):
        DiffusionModel(folder / "unet")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3"])
def test_a_broken_index_is_named(copy, text):
    (copy / "model_index.json").write_text(text)
    with pytest.raises(LoadError, match=r"model_index\.json"):
        DiffusionModel(copy)


def broken_class(path):
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))


def lost_part(path):
    shutil.rmtree(path / "unet")


def lost_weights(path):
    (path / "unet" / "diffusion_pytorch_model.safetensors").unlink()


def broken_weights(path):
    (path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights")


def broken_config(path):
    (path / "unet" / "config.json").write_text("{")


def other_shape(path):
    config = json.loads((path / "unet" / "config.json").read_text())
    (path / "unet" / "config.json").write_text(json.dumps({**config, "block_out_channels": [16, 32]}))


@pytest.mark.parametrize(
    "damage", [broken_class, lost_part, lost_weights, broken_weights, broken_config, other_shape]
)
def test_a_damaged_folder_is_an_error_that_names_it(copy, damage):
    DiffusionModel(copy).dispatch()
    damage(copy)
    for dispatch in (True, None):
        with pytest.raises(WorkbenchError, match=str(copy)):
            DiffusionModel(copy, dispatch=dispatch).dispatch()
