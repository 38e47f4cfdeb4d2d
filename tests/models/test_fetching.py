"""Repositories that cannot be fetched whole: one error that says where it came to an end, and a way on."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import hub, tiny
from workbench.errors import LoadError
from workbench.models.model import DiffusionModel

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "tiny"
    pipeline = tiny.sd1()
    pipeline.vae.half()
    pipeline.save_pretrained(path)
    (path / "pipeline.py").write_text(
        "from diffusers import StableDiffusionPipeline\n\n\n"
        "class OwnPipeline(StableDiffusionPipeline):\n    pass\n"
    )
    return path


@pytest.fixture(scope="module")
def found(repository, tmp_path_factory):
    """What a process of its own met on a Hub of this machine; and where its caches are."""
    folder = tmp_path_factory.mktemp("caches")
    done = subprocess.run(
        [sys.executable, "-m", "tests.hub", str(repository), str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def latents(repository):
    model = DiffusionModel(repository)
    return model.record("a red circle", seed=0, num_inference_steps=1, output_type="latent").latents.flatten()


@pytest.mark.parametrize("fault", ["cut_off", "full"])
def test_weights_that_come_half_leave_a_model_that_goes_on_when_they_can(found, latents, fault):
    folder, faults = found
    met = faults[fault]
    assert met["kind"] == "LoadError"
    assert met["said"].startswith(f"{hub.NAME} could not be fetched into {folder / fault}: ")
    assert re.search(rf"Not all is in {folder / fault}/.*/{hub.COMMIT} of .*unet", met["said"])
    assert "What is there is kept: try again" in met["said"]
    assert met["waiting"]
    assert torch.equal(torch.tensor(met["latents"]), latents)


def test_each_fault_is_in_the_words(found):
    assert "reset" in found[1]["cut_off"]["said"]
    assert "File too large" in found[1]["full"]["said"]


def test_a_configuration_that_comes_half_is_no_model(found, latents):
    folder, faults = found
    met = faults["cut_off_early"]
    assert met["kind"] == "LoadError"
    assert met["said"].startswith(f"{hub.NAME} could not be fetched into {folder / 'cut_off_early'}: ")
    assert re.search(rf"Not all is in .*/{hub.COMMIT} of unet\.", met["said"])
    assert torch.equal(torch.tensor(met["latents"]), latents)


def test_the_dtypes_of_weights_on_the_hub_are_known_before_they_are_fetched(found):
    met = found[1]["headers"]
    assert met["fetched"] == []
    assert met["told"] == met["is"]
    sizes = DiffusionModel(tiny.sd1()).memory()
    assert met["told"]["unet"] == sizes["unet"]["float32"]
    assert met["told"]["vae"] == sizes["vae"]["float16"]


def test_a_token_goes_along_and_files_are_fetched_again_when_that_is_asked_for(found):
    first, cached, forced = found[1]["again"]["times"]
    weights = [name for name in first if name.endswith(".safetensors")]
    assert len(weights) == 3
    assert {first[name][1] for name in first} == {"Bearer hf_secret"}
    for name in weights:
        assert cached[name][0] == first[name][0]
        assert forced[name][0] > cached[name][0]
    assert {forced[name][1] for name in weights} == {None}


def test_a_pipeline_whose_code_a_repository_brings_is_opened_when_that_is_asked_for(found, latents):
    met = found[1]["custom"]
    assert met["kind"] == "InputError"
    assert "trust_remote_code=True" in met["said"]
    assert met["class"] == "OwnPipeline"
    assert torch.equal(torch.tensor(met["latents"]), latents)


def test_no_server_at_all_is_said_whether_weights_are_asked_for_or_not(found):
    folder, faults = found
    for met in (faults["nobody"], faults["nobody"]["dispatched"]):
        assert met["kind"] == "LoadError"
        assert f"{hub.NAME} could not be fetched into {folder / 'nobody'}" in met["said"]


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_half_filled_cache_without_a_network_names_what_is_not_there(repository, tmp_path, part):
    home = tmp_path / f"models--{hub.NAME.replace('/', '--')}"
    snapshot = home / "snapshots" / hub.COMMIT
    shutil.copytree(repository, snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(hub.COMMIT)
    model = DiffusionModel(hub.NAME, cache_dir=tmp_path)
    shutil.move(snapshot / part, tmp_path / "elsewhere")
    with pytest.raises(LoadError, match=rf"{snapshot / part} has .*{part}.*Copy or download it again"):
        model.dispatch()
    assert not model.dispatched
    with pytest.raises(LoadError, match=f"{snapshot / part} has "):
        DiffusionModel(hub.NAME, cache_dir=tmp_path)
    shutil.move(tmp_path / "elsewhere", snapshot / part)
    model.dispatch()
    assert model.dispatched
