"""A model whose tree is there before its weights are."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from tests import tiny
from tests.tiny import large
from tests.watching import as_bytes
from workbench import zoo
from workbench.errors import LoadError, TraceError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.models.outline import outline

RUN = {"prompt": "a red circle", "num_inference_steps": 2, "seed": 0}


def devices(model):
    return {
        weight.device.type
        for part in model.components.values()
        if isinstance(part, torch.nn.Module)
        for weight in part.parameters()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    tiny.sd3().save_pretrained(folder)
    return folder


def test_the_tree_is_that_of_the_loaded_model_without_its_weights(folder):
    waiting, loaded = DiffusionModel(folder), DiffusionModel(folder, dispatch=True)
    assert (waiting.dispatched, loaded.dispatched) == (False, True)
    assert devices(waiting) == {"meta"}
    assert list(waiting.components) == list(loaded.components)
    assert waiting.automodel is loaded.automodel
    plain = [
        [(node.path, node.cls, node.depth, node.parameters, node.kind) for node in outline(model)]
        for model in (waiting, loaded)
    ]
    assert plain[0] == plain[1]
    assert waiting.tokenizer("red").input_ids == loaded.tokenizer("red").input_ids
    assert list(waiting.denoisers) == ["transformer"]
    assert not waiting.dispatched


@pytest.mark.parametrize("use", ["record", "generate", "trace", "call", "pipeline", "gradient"])
def test_the_first_use_loads_the_weights(use):
    model = DiffusionModel("shapes-unet", dispatch=False)
    site = model.unet.mid_block
    match use:
        case "record":
            image = model.record(**RUN).images[0]
            assert as_bytes(image) == as_bytes(DiffusionModel("shapes-unet").record(**RUN).images[0])
        case "generate" | "trace":
            with getattr(model, use)(**RUN) as run:
                assert site.output.device.type == "cpu"
            assert run.images
        case "call":
            assert model("a red circle").images
        case "gradient":
            assert model.gradient(**RUN, of=torch.mean, wrt="unet.mid_block", result="latents").value
        case "pipeline":
            assert isinstance(model.pipeline, StableDiffusionPipeline)
    assert model.dispatched
    assert devices(model) == {"cpu"}


def test_dispatch_loads_once():
    model = DiffusionModel("shapes-unet", dispatch=False)
    model.dispatch()
    pipeline = model.pipeline
    model.dispatch()
    assert model.pipeline is pipeline


def test_a_live_pipeline_is_there_already():
    assert DiffusionModel(tiny.sd1(), dispatch=False).dispatched


def test_a_part_given_by_name_is_the_one_in_the_tree(folder):
    mine = tiny.sd3().transformer
    model = DiffusionModel(folder, dispatch=False, transformer=mine)
    assert model.components["transformer"] is mine
    assert model.pipeline.transformer is mine


def test_a_value_is_not_there_before_a_run():
    with pytest.raises(TraceError, match="only while the model runs"):
        _ = DiffusionModel("shapes-unet", dispatch=False).unet.mid_block.output


def test_what_is_no_pipeline_is_refused_at_once(tmp_path):
    with pytest.raises(LoadError, match="no model_index"):
        DiffusionModel(tmp_path, dispatch=False)
    with pytest.raises(LoadError, match="fetched"):
        DiffusionModel("nobody/nothing", dispatch=False)
    with pytest.raises(UnknownNameError, match="shapes-unet"):
        DiffusionModel("shapes-unett", dispatch=False)


def test_weights_that_cannot_be_loaded_leave_the_tree(tmp_path):
    tiny.sd1().save_pretrained(tmp_path)
    model = DiffusionModel(tmp_path, dispatch=False)
    (next((tmp_path / "unet").glob("*.safetensors"))).write_bytes(b"no weights")
    with pytest.raises(LoadError, match="cannot be read"):
        model.dispatch()
    assert not model.dispatched
    assert model.unet.mid_block.path == "unet.mid_block"


def test_a_part_of_a_class_that_nobody_knows_is_named(tmp_path):
    tiny.sd1().save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace('"UNet2DConditionModel"', '"UNet9DModel"'))
    with pytest.raises(LoadError, match=r"unet is a diffusers\.UNet9DModel"):
        DiffusionModel(tmp_path, dispatch=False)


def test_a_hub_repository_is_looked_up_without_its_weights(tmp_path, monkeypatch):
    """From the Hub's cache on disk, as after an earlier look-up: only the small files are in it."""
    source, cache = zoo.path("shapes-unet"), tmp_path / "cache"
    revision = "0" * 40
    snapshot = cache / "models--someone--shapes" / "snapshots" / revision
    for file in source.rglob("*"):
        if file.suffix in (".json", ".txt"):
            copy = snapshot / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    refs = cache / "models--someone--shapes" / "refs"
    refs.mkdir()
    (refs / "main").write_text(revision)
    model = DiffusionModel("someone/shapes", dispatch=False, cache_dir=str(cache), local_files_only=True)
    assert model.reference == "someone/shapes"
    assert devices(model) == {"meta"}
    with pytest.raises(LoadError, match="vae has no safetensors file, so vae has no weights"):
        model.record(**RUN)


@pytest.mark.parametrize("name", large.PARAMETERS)
def test_the_tree_of_a_large_model_needs_no_weights(name, tmp_path):
    model = DiffusionModel(large.write(tmp_path, name), dispatch=False)
    nodes = {node.path: node for node in outline(model)}
    for part, parameters in large.PARAMETERS[name].items():
        assert nodes[part].parameters == parameters
    assert {node.device for node in nodes.values()} <= {"meta", ""}
    with pytest.raises(LoadError, match="has no weights"):
        model.dispatch()
    assert not model.dispatched


def test_a_place_taken_before_the_weights_is_the_loaded_one_after():
    model = DiffusionModel("shapes-unet", dispatch=False)
    place = model.unet.conv_in
    assert place.module.weight.is_meta
    model.dispatch()
    assert place.module is model.pipeline.unet.conv_in
    assert not place.weight.is_meta


def test_folders_wait_for_their_first_use_and_the_zoo_does_not(folder):
    assert [DiffusionModel(each).dispatched for each in (folder, str(folder), "shapes-unet")] == [
        False,
        False,
        True,
    ]


def test_a_class_that_chooses_another_has_the_tree_of_the_one_that_is_named(folder):
    model = DiffusionModel(folder, automodel="AutoPipelineForText2Image")
    assert list(model.denoisers) == ["transformer"]
    assert not model.dispatched
    model.dispatch()
    assert model.automodel.__name__ == "StableDiffusion3Pipeline"


# What loading would give


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Pipelines whose parts are kept in dtypes of their own; classes of two of them keep some in float32."""
    folder = tmp_path_factory.mktemp("mixed")
    for name in ("sd1", "sd3", "wan"):
        pipeline = tiny.CASES[name].build()
        pipeline.text_encoder.half()
        (pipeline.unet if name == "sd1" else pipeline.transformer).to(torch.bfloat16)
        pipeline.save_pretrained(folder / name)
    return folder


def dtypes(model):
    return {
        f"{name}.{path}": each.dtype
        for name, part in model.components.items()
        if isinstance(part, torch.nn.Module)
        for path, each in (*part.named_parameters(), *part.named_buffers())
    }


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"dtype": "auto"},
        {"torch_dtype": torch.float16},
        {"dtype": "bfloat16"},
        {"dtype": {"vae": torch.bfloat16, "default": torch.float16}},
        {"dtype": {"text_encoder": "float16"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sd1", "sd3", "wan"])
def test_the_tree_has_the_dtypes_that_loading_gives(mixed, name, asked):
    model = DiffusionModel(mixed / name, **asked)
    told, tree, memory = dtypes(model), [node.dtype for node in outline(model)], model.memory()
    assert not model.dispatched
    model.dispatch()
    assert dtypes(model) == told
    assert [node.dtype for node in outline(model)] == tree
    assert model.memory() == memory
    for part, bytes_of in memory.items():
        weights = model.components[part]
        assert bytes_of["as_is"] == sum(each.nbytes for each in (*weights.parameters(), *weights.buffers()))


def test_the_dtypes_of_the_files_are_read_without_their_weights(mixed):
    model = DiffusionModel(mixed / "sd1", dtype="auto")
    nodes = {node.path: node.dtype for node in outline(model)}
    assert (nodes["unet"], nodes["text_encoder"], nodes["vae"]) == ("bfloat16", "float16", "float32")
    told = model.memory()
    assert told["unet"]["as_is"] == told["unet"]["bfloat16"] < told["unet"]["float32"]
    assert told["vae"]["as_is"] == told["vae"]["float32"]
    assert devices(model) == {"meta"}
    plain = DiffusionModel(mixed / "sd1").memory()
    assert plain["unet"]["as_is"] == plain["unet"]["float32"]
