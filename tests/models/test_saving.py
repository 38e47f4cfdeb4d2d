"""Saving over an earlier save: all of it or nothing, whatever the disk does."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests import tiny
from tests.disks import longest_file, small_disk
from tests.watching import as_bytes
from workbench.errors import StoreError
from workbench.models.model import DiffusionModel


@pytest.fixture(scope="module")
def first():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def second():
    """A model with other weights."""
    model = DiffusionModel(tiny.sd1())
    for part in model.components.values():
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data.mul_(0.9)
    return model


def is_at(folder, model, **options):
    """Whether what a folder holds is this model, weight by weight."""
    found = DiffusionModel(folder, dispatch=True, **options)
    return all(
        as_bytes(part.state_dict()) == as_bytes(found.components[name].state_dict())
        for name, part in model.components.items()
        if isinstance(part, torch.nn.Module)
    )


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as disk:
        yield disk


# Into the weights of each component in turn, and into the tokenizer, which is no module.
@pytest.mark.parametrize("room", [0, 40_000, 110_000, 160_000, 300_000])
def test_a_full_disk_leaves_the_earlier_save(disk, first, second, room):
    target = disk.path / "model"
    first.save_pretrained(target)
    before = content(disk.path)
    disk.leave(room)
    with pytest.raises(StoreError, match=f"{target} (could not|cannot) be written.*No space left on device"):
        second.save_pretrained(target)
    assert content(disk.path) == before
    assert is_at(target, first)
    disk.leave(16_000_000)
    second.save_pretrained(target)
    assert is_at(target, second)
    assert not is_at(target, first)


@pytest.mark.parametrize("safe", [True, False])
def test_a_file_that_cannot_grow_is_an_error_of_ours(tmp_path, first, safe):
    with longest_file(65_000), pytest.raises(StoreError, match=f"{tmp_path / 'model'} could not be written"):
        first.save_pretrained(tmp_path / "model", safe_serialization=safe)
    assert list(tmp_path.iterdir()) == []
    first.save_pretrained(tmp_path / "model", safe_serialization=safe)
    assert is_at(tmp_path / "model", first, use_safetensors=safe)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, first):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(StoreError, match=r"is a file\. Choose another name"):
        first.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


@pytest.mark.parametrize("sizes", [(None, "100KB"), ("100KB", None), ("100KB", "200KB")])
def test_weights_take_the_place_of_earlier_ones_however_many_files_they_are(tmp_path, first, second, sizes):
    first.save_pretrained(tmp_path / "model", max_shard_size=sizes[0])
    (tmp_path / "model" / "notes.md").write_text("mine")
    (tmp_path / "model" / "unet" / "notes.md").write_text("mine too")
    second.save_pretrained(tmp_path / "model", max_shard_size=sizes[1])
    second.save_pretrained(tmp_path / "fresh", max_shard_size=sizes[1])
    extra = content(tmp_path / "model").keys() - content(tmp_path / "fresh").keys()
    assert sorted(map(str, extra)) == ["notes.md", "unet/notes.md"]
    assert is_at(tmp_path / "model", second)


def test_a_variant_stands_beside_the_plain_weights(tmp_path, first, second):
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path, variant="mine", max_shard_size="100KB")
    second.save_pretrained(tmp_path, variant="mine")
    assert is_at(tmp_path, first)
    assert is_at(tmp_path, second, variant="mine")
    assert not list(tmp_path.rglob("*-of-*"))
    assert not list(tmp_path.rglob("*.index.*"))


def test_a_model_is_saved_over_the_files_that_it_was_opened_from(tmp_path, second):
    second.save_pretrained(tmp_path)
    model = DiffusionModel(tmp_path, dispatch=True)
    model.save_pretrained(tmp_path)
    assert is_at(tmp_path, model)
    assert is_at(tmp_path, second)
    assert StableDiffusionPipeline.from_pretrained(tmp_path).unet.dtype == torch.float32
