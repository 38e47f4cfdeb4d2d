"""Records on disk: everything comes back, lazily, and a folder is a record or is not one."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from tests import tiny
from tests.killing import killed_at_each_operation
from tests.watching import as_bytes
from workbench.attention.request import Attention
from workbench.errors import InputError, StoreError, UnknownNameError
from workbench.interventions.control import RandomDirection
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Passage, Record, RunSpec
from workbench.tracing.storage.packing import Unsaved
from workbench.tracing.storage.saved import load_record

SITE = "unet.mid_block"
SITES = [SITE, "unet.down_blocks.0", "unet:inputs", "unet:output", "text_encoder", "vae.encoder"]


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def record(model):
    return model.record("a red circle", num_inference_steps=3, seed=0, capture=[*SITES, Attention()])


@pytest.fixture
def folder(record, tmp_path):
    return record.save(tmp_path / "run")


def kinds(value):
    """Spell the types of a structure, and the strides of its tensors."""
    if isinstance(value, torch.Tensor):
        return value.stride()
    if isinstance(value, dict):
        return type(value), {key: kinds(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [kinds(item) for item in value]
    return type(value)


def everything(record):
    """Spell all a record holds, so that equality means the same bytes, types and strides."""
    held = {
        "output": record.output,
        "captured": {site: [vars(each) for each in kept] for site, kept in record.captured.items()},
        "calls": record.calls,
        "ticks": record.ticks,
        "initial": record.initial,
        "rng_state": record.rng_state,
    }
    return as_bytes(held), {name: kinds(value) for name, value in held.items() if name != "output"}


def kept(value, folder):
    """Save a value as what passed a site, and return what is loaded."""
    Record(RunSpec(), captured={"a.site": [Passage(None, value)]}).save(folder)
    return load_record(folder).captured["a.site"][0].value


# There and back


@pytest.mark.parametrize("name", ["sd1", "flux", "flux-cfg", "wan", "dit"])
def test_everything_comes_back(name, tmp_path):
    case = tiny.CASES[name]
    model = DiffusionModel(case.build())
    record = model.record(**case.arguments, seed=3, capture=[case.site, f"{case.site}:inputs"])
    loaded = load_record(record.save(tmp_path / "run"), model=model)
    assert everything(loaded) == everything(record)
    assert loaded.spec == record.spec
    assert loaded.ledger == record.ledger
    assert type(loaded.output) is type(record.output)
    fork, other = (each.fork(2) for each in (loaded, record))
    assert everything(fork) == everything(other) == everything(record)


def test_a_loaded_record_is_read_like_the_one_saved(record, folder):
    loaded = load_record(folder)
    assert torch.equal(loaded[SITE], record[SITE])
    assert torch.equal(loaded.at(SITE, step=1, branch="cond"), record.at(SITE, step=1, branch="cond"))
    assert torch.equal(loaded.step_latents(-1), record.step_latents(-1))
    assert torch.equal(loaded.pred_x0, record.pred_x0)
    assert [each.call for each in loaded.passages("text_encoder")] == [None, None]
    with pytest.raises(UnknownNameError, match=r"'unet\.mid_block'"):
        loaded["unet.midblock"].clone()
    assert isinstance(loaded, Record)


def test_attention_maps_come_back(record, folder):
    loaded = load_record(folder).attention
    assert as_bytes(loaded.layers) == as_bytes(record.attention.layers)
    assert (loaded.rows, loaded.words) == (record.attention.rows, record.attention.words)
    size = record.images[0].size
    assert torch.equal(
        loaded.map("circle", step=1, size=size), record.attention.map("circle", step=1, size=size)
    )


def test_a_fork_of_a_loaded_record_is_the_fork_of_the_one_saved(record, folder, model):
    loaded = load_record(folder)
    loaded.model = model
    for change in ({}, {"prompt": "a blue square"}, {"guidance_scale": 1.0}):
        assert everything(loaded.fork(1, **change)) == everything(record.fork(1, **change))


@pytest.mark.parametrize("branch", ["all", "cond"])
def test_the_shipped_model_is_patched_from_disk_as_from_memory(tmp_path, branch):
    model = DiffusionModel("shapes-unet")
    ask = {"num_inference_steps": 4, "seed": 0}
    source = model.record("a red circle", capture=["unet.mid_block"], **ask)
    loaded = load_record(source.save(tmp_path / "source"))
    live, saved, plain = (
        model.record("a blue square", interventions=patches, **ask)
        for patches in (
            [Patch(SITE, source=source, branch=branch)],
            [Patch(SITE, source=loaded, branch=branch)],
            [],
        )
    )
    assert as_bytes(saved.latents) == as_bytes(live.latents)
    assert as_bytes(saved.images) == as_bytes(live.images)
    assert as_bytes(plain.latents) != as_bytes(live.latents)
    assert loaded.spec.model == "shapes-unet"


def test_a_patched_run_is_saved_with_its_source(record, model, tmp_path):
    patch = Patch(SITE, source=record, steps=range(0, 2), branch="cond")
    edits = [patch, RandomDirection.of(patch, seed=4)]
    patched = model.record("a blue square", num_inference_steps=3, seed=0, interventions=edits)
    loaded = load_record(patched.save(tmp_path / "run"), model=model)
    assert [type(each) for each in loaded.spec.interventions] == [Patch, RandomDirection]
    assert loaded.spec.interventions[0].steps == (0, 1)
    assert everything(loaded.spec.interventions[0].source) == everything(record)
    assert everything(loaded.fork(0)) == everything(patched)
    assert as_bytes(loaded.fork(0, interventions=[]).latents) != as_bytes(patched.latents)


def test_images_and_tensors_that_were_given_come_back(tmp_path):
    model = DiffusionModel(
        StableDiffusionImg2ImgPipeline(**tiny.sd1().components, requires_safety_checker=False)
    )
    model.pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    given = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    embeds = torch.randn(1, 24, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    record = model.record(
        prompt_embeds=embeds, negative_prompt_embeds=-embeds, image=given, num_inference_steps=4, seed=0
    )
    loaded = load_record(record.save(tmp_path / "run"), model=model)
    assert as_bytes(loaded.spec.arguments) == as_bytes(record.spec.arguments)
    assert as_bytes(loaded.fork(1).latents) == as_bytes(record.latents)
    names = [path.stem for path in (tmp_path / "run").glob("data-*/files/*")]
    assert all(len(name) == 64 for name in names)
    assert len(names) == 4


def test_what_is_no_data_is_named_and_must_be_given_again(model, tmp_path):
    def watch(pipeline, step, timestep, values):
        return values

    record = model.record("a red circle", num_inference_steps=2, seed=0, callback_on_step_end=watch)
    with pytest.warns(UserWarning, match=r"callback_on_step_end \(function\)"):
        record.save(tmp_path / "run")
    loaded = load_record(tmp_path / "run", model=model)
    assert loaded.spec.arguments["callback_on_step_end"] == Unsaved("function")
    with pytest.raises(InputError, match="callback_on_step_end was a function"):
        loaded.fork(1)
    assert as_bytes(loaded.fork(1, callback_on_step_end=watch).latents) == as_bytes(record.latents)


STRUCTURES = [
    (torch.arange(6.0).reshape(2, 3), None),
    [torch.zeros(2), {"one": None, "two": (1, 2.5, "three", True)}],
    {"~": 1, 3: torch.ones(1)},
    OrderedDict(first=torch.zeros(1)),
    (float("nan"), float("inf"), -0.0, 2**70),
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.randn(1, 4, 6, 6).to(memory_format=torch.channels_last),
    torch.randn(3, 4).T,
    torch.randn(1, 3).expand(2, 3),
    torch.zeros(0, 3),
    torch.tensor(3),
    torch.randn(2, dtype=torch.complex64),
    torch.randn(2, dtype=torch.complex128),
    torch.tensor([True, False]),
    torch.randn(3).to(torch.bfloat16),
    torch.randn(3).to(torch.float8_e4m3fn),
    np.arange(6, dtype=np.float16).reshape(2, 3)[:, ::-1],
    np.array(["a", "bc"]),
    np.float32(1.5),
    torch.Size([1, 2]),
    torch.float16,
    torch.device("cpu"),
    slice(None, 3),
    range(1, 9, 2),
    Path("some/where"),
]


@pytest.mark.parametrize("value", STRUCTURES, ids=lambda value: type(value).__name__)
def test_a_structure_comes_back(value, tmp_path):
    loaded = kept(value, tmp_path / "run")
    assert as_bytes(loaded) == as_bytes(value) or repr(loaded) == repr(value)
    if not (isinstance(value, torch.Tensor) and 0 in value.stride()):
        assert kinds(loaded) == kinds(value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F"])
def test_an_image_of_any_mode_comes_back(mode, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode == "LA" else "RGB").convert(mode)
    assert as_bytes(kept(image, tmp_path / "run")) == as_bytes(image)


def test_a_distribution_of_the_autoencoder_comes_back(model, tmp_path):
    value = model.pipeline.vae.encode(torch.zeros(1, 3, 16, 16))
    loaded = kept(value, tmp_path / "run")
    assert type(loaded.latent_dist) is type(value.latent_dist)
    assert torch.equal(loaded.latent_dist.mode(), value.latent_dist.mode())


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    base = torch.arange(10.0)
    loaded = kept([base, base[2:5], base[4:], base], tmp_path / "run")
    assert as_bytes(loaded) == as_bytes([base, base[2:5], base[4:], base])
    again = kept(loaded, tmp_path / "again")
    assert as_bytes(again) == as_bytes(loaded)


def test_a_record_can_be_saved_over_the_folder_it_is_read_from(folder, record):
    loaded = load_record(folder)
    loaded.captured.pop("text_encoder")
    loaded.save(folder)
    again = load_record(folder)
    assert torch.equal(again[SITE], record[SITE])
    assert "text_encoder" not in again.captured
    assert len(list(folder.glob("data-*"))) == 1


# Lazily, and without pickle


def test_opening_reads_only_json(record, folder):
    for path in folder.glob("data-*/**/*"):
        if path.is_file():
            path.write_bytes(bytes(path.stat().st_size))
    loaded = load_record(folder)
    assert loaded.ledger == record.ledger
    assert loaded.spec.arguments == record.spec.arguments
    sizes = {each.name: each.count for each in loaded.holdings()}
    assert (sizes[SITE], sizes["latents"], sizes["output"]) == (3, 3, 1)
    assert "3 steps" in repr(loaded)
    # Control: what opening would have met, had it read any further.
    for read in (
        lambda: loaded.latents,
        lambda: loaded[SITE],
        lambda: loaded.images,
        lambda: loaded.attention,
    ):
        with pytest.raises(StoreError, match="damaged"):
            read()


def test_tensors_are_mapped_when_they_are_asked_for(folder):
    def mapped():
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if str(folder) in line]

    loaded = load_record(folder)
    assert not mapped()
    value = loaded[SITE]
    assert mapped()
    before = as_bytes(value)
    loaded.passages(SITE)[0].value.zero_()
    assert as_bytes(load_record(folder)[SITE]) == before


def test_files_are_json_safetensors_and_png(folder):
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors", ".png"}
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


# Written whole or not at all


def _kill_cases(record, model, tmp_path):
    other = model.record("a blue square", num_inference_steps=1, seed=5, capture=[SITE])
    return tmp_path / "run", other


def test_killed_at_any_file_operation_the_old_record_or_the_new_is_there(record, model, tmp_path):
    target, other = _kill_cases(record, model, tmp_path)
    old, new = everything(record), everything(other)
    seen = []
    for killed in killed_at_each_operation(lambda: other.save(target), lambda: record.save(target)):
        found = everything(load_record(target))
        assert found in (old, new)
        seen.append(found == new)
        assert killed or found == new
    assert len(seen) > 20
    assert seen.count(False) > 5
    assert not list(tmp_path.glob(".run.*.partial")) or other.save(target)
    assert not list(tmp_path.glob(".run.*.partial"))
    assert len(list(target.glob("data-*"))) == 1


def test_killed_at_any_file_operation_a_first_save_leaves_nothing_or_a_record(record, model, tmp_path):
    target, other = _kill_cases(record, model, tmp_path)
    new = everything(other)
    found = []
    for killed in killed_at_each_operation(
        lambda: other.save(target), lambda: shutil.rmtree(target, ignore_errors=True)
    ):
        assert not target.exists() or everything(load_record(target)) == new
        found.append(target.exists())
        assert killed or target.exists()
    assert not all(found)


def test_control_a_writer_that_does_not_rename_is_caught(record, model, tmp_path):
    target, other = _kill_cases(record, model, tmp_path)

    def naive():
        shutil.rmtree(target)
        target.mkdir()
        other.write_into(target)

    old, new = everything(record), everything(other)

    def state():
        try:
            return everything(load_record(target))
        except StoreError:
            return None

    def prepare():
        shutil.rmtree(target, ignore_errors=True)
        record.save(target)

    found = [state() for _ in killed_at_each_operation(naive, prepare)]
    assert any(each not in (old, new) for each in found)


def test_an_error_in_the_middle_leaves_the_old_record(record, folder):
    before = everything(load_record(folder))
    broken = Record(record.spec, captured={SITE: [Passage(0, torch.zeros(2, device="meta"))]})
    with pytest.raises(NotImplementedError, match="meta"):
        broken.save(folder)
    assert everything(load_record(folder)) == before
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


# Bad input


def change(folder, **changes):
    path = folder / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def tensors_of(folder):
    return next(folder.glob("data-*/captured.safetensors"))


BAD = {
    "missing": (lambda folder: shutil.rmtree(folder), "is not there; give the folder"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "is a file"),
    "no index": (lambda folder: (folder / "record.json").unlink(), r"has no record\.json, only data-"),
    "cut index": (lambda folder: (folder / "record.json").write_text('{"format": "work'), "cut short"),
    "empty index": (lambda folder: (folder / "record.json").write_text(""), "cut short"),
    "other json": (lambda folder: (folder / "record.json").write_text("[1]"), "is not ours"),
    "other format": (lambda folder: change(folder, format="x"), "is not ours"),
    "newer": (lambda folder: change(folder, version=2), r"version 2 .* reads up to 1\. Update"),
    "no data": (lambda folder: change(folder, data=None), "is not complete"),
    "data elsewhere": (lambda folder: change(folder, data="../other"), "is not complete"),
    "file elsewhere": (lambda folder: change(folder, files={"../../x": 1}), "names a file outside"),
    "cut tensors": (lambda folder: tensors_of(folder).write_bytes(b"x"), "has 1 bytes of"),
    "missing tensors": (lambda folder: tensors_of(folder).unlink(), "is missing"),
    "bad ledger": (lambda folder: change(folder, ledger=[{"call": "x"}]), "changed since"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_named_error_that_says_what_to_do(folder, name):
    spoil, message = BAD[name]
    spoil(folder)
    with pytest.raises(StoreError, match=message):
        load_record(folder)


@pytest.mark.parametrize(
    "node",
    [
        {"~": "data", "class": "os:system", "fields": {}},
        {"~": "data", "class": "subprocess:Popen", "fields": {"args": ["true"]}},
        {"~": "data", "class": "workbench.models.model:DiffusionModel", "fields": {"model": "shapes-unet"}},
        {"~": "output", "class": "builtins:dict", "items": {}},
        {"~": "object", "class": "diffusers:UNet2DModel", "state": {}},
        {"~": "object", "class": "not_imported_yet:Thing", "state": {}},
        {"~": "model", "class": "builtins:int", "fields": {}},
        {"~": "nonsense"},
        {"~": "tensor", "file": "captured.safetensors", "key": "nowhere", "dtype": "float32", "shape": [1]},
        {"~": "tensor", "file": "../../../x.safetensors", "key": "x", "dtype": "float32", "shape": [1]},
        {"~": "image", "mode": "RGB", "size": [1, 1], "file": "files/00.png"},
        {"~": "record", "folder": "../../.."},
    ],
)
def test_a_tampered_index_is_refused_when_it_is_read(folder, node):
    values = json.loads((folder / "record.json").read_text())["values"]
    change(folder, values={**values, "output": node})
    loaded = load_record(folder)
    assert loaded[SITE].shape[0] == 3
    with pytest.raises(StoreError):
        loaded.output.clear()


@pytest.mark.parametrize("content", ["something else", None])
def test_what_is_not_ours_is_not_overwritten(record, tmp_path, content):
    target = tmp_path / "run"
    if content is None:
        target.write_text("a file")
    else:
        target.mkdir()
        (target / "thesis.txt").write_text(content)
    with pytest.raises(StoreError, match="Choose another"):
        record.save(target)
    assert target.is_file() or (target / "thesis.txt").read_text() == content
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_empty_folder_and_folders_that_are_not_there_are_taken(record, tmp_path):
    (tmp_path / "empty").mkdir()
    assert load_record(record.save(tmp_path / "empty")).ledger == record.ledger
    assert load_record(record.save(str(tmp_path / "a" / "b"))).ledger == record.ledger


def test_a_record_must_be_told_a_model_before_it_is_forked(folder):
    with pytest.raises(InputError, match=r"record\.model = wb\.DiffusionModel"):
        load_record(folder).fork(1)
    with pytest.raises(InputError, match="Open it first"):
        load_record(folder, model="shapes-unet")
