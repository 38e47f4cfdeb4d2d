"""Components spread over ranks: what they compute, what they hold, and how they end."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch.distributed.fsdp import CPUOffloadPolicy

from tests import ranks, tiny
from workbench.errors import InputError, LoadError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.models.parallel import schemes
from workbench.models.parallel.managers import blocks, choose_device, make_trainable
from workbench.models.parallel.nemo import NeMoAutoDiffusionPipeline

CPU = torch.device("cpu")
REPOSITORY = Path(__file__).parents[2]


def together(function, folder, *, count=2, patience=300, **environment):
    """Run a function of `tests.ranks` on every rank; returns how it ended and when."""
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        "-m",
        "tests.ranks",
    ]
    done = subprocess.run(
        [sys.executable, *command, function, str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
    )
    return done, time.time()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("parallel")
    for name in ranks.FAMILIES:
        tiny.CASES[name].build().save_pretrained(path / name)
    return path


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_itself(folder):
    """Run `tests.ranks.alone` in a process of its own: in this one, earlier runs decide on the kernels."""
    command = [sys.executable, "-m", "tests.ranks", "alone", str(folder)]
    subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True
    )


@pytest.fixture(scope="module")
def sharded(folder):
    by_itself(folder)
    done, _ = together("families", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", ranks.FAMILIES)
def test_shards_compute_what_one_process_does(sharded, name):
    alone = torch.load(sharded / f"{name}-alone.pt", weights_only=True)
    for rank in (0, 1):
        found = torch.load(sharded / f"{name}-{rank}.pt", weights_only=True)
        for what, value in alone.items():
            mine, theirs = (each if isinstance(each, tuple) else (each,) for each in (value, found[what]))
            for one, other in zip(mine, theirs, strict=True):
                assert torch.equal(one, other), (rank, what)
    assert not torch.equal(alone["patched"], alone["latents"])


def test_copies_and_split_layers_compute_the_same(folder):
    done, _ = together("copies", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    by_itself(folder)
    whole = torch.load(folder / "flux-alone.pt", weights_only=True)
    alone, by_words = whole["patched"], torch.load(folder / "sd1-alone.pt", weights_only=True)["patched"]
    for rank in (0, 1):
        found = torch.load(folder / f"copies-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["sequence"], by_words, rtol=1e-4, atol=1e-4)
        assert torch.equal(found["offloaded"], alone)
        seen = found["mixed"]["captured"]
        assert {each.dtype for each in (seen if isinstance(seen, tuple) else (seen,))} == {torch.bfloat16}
        near = found["mixed"]["patched"].float()
        assert not torch.equal(near, alone)
        torch.testing.assert_close(near, alone, rtol=0.05, atol=0.05)
        assert torch.equal(found["ddp"], alone)
        assert found["layers"]
        assert not [path for path in (*found["layers"], *found["sites"]) if ".module" in path]
        assert "transformer.transformer_blocks.0:output[1]" in found["sites"]
        torch.testing.assert_close(found["tp"], alone, rtol=1e-4, atol=1e-4)

    # What ddp trained is saved as the component itself, and opens again.
    again = torch.load(folder / "trained-alone.pt", weights_only=True)["patched"]
    assert torch.equal(again, alone)


def test_shards_of_split_layers_compute_the_same_and_are_drawn_alike(folder):
    done, _ = together("meshes", folder, count=4)
    assert done.returncode == 0, done.stderr[-4000:]
    if not (folder / "flux-alone.pt").exists():
        by_itself(folder)
    alone = torch.load(folder / "flux-alone.pt", weights_only=True)
    spec = {"transformer_cls": "FluxTransformer2DModel", "load_full_pipeline": True}
    built = DiffusionModel.from_config(folder / "flux", spec, seed=3)
    settings = {**tiny.CASES["flux"].arguments, "num_inference_steps": ranks.STEPS, "output_type": "latent"}
    latents, drawn = built.record(seed=0, **settings).latents, built.components["transformer"]
    for rank in range(4):
        found = torch.load(folder / f"meshes-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["patched"], alone["patched"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["forked"], alone["forked"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["built"], latents, rtol=1e-4, atol=1e-4)
        assert all(torch.equal(each, drawn.get_parameter(path)) for path, each in found["drawn"].items())


def test_gradients_are_the_mean_over_the_ranks(folder, one_thread):
    done, _ = together("training", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    means = []
    for rank in (0, 1):
        unet = DiffusionModel(folder / "sd1", dispatch=True).components["unet"].train()
        for step in (0, 1):
            ranks.backward(unet, step, rank)
        means.append({path: each.grad for path, each in unet.named_parameters() if each.grad is not None})
    for rank in (0, 1):
        found = torch.load(folder / f"training-{rank}.pt", weights_only=True)
        for kind in ("fsdp2", "ddp", "at once"):
            assert found[kind].keys() == means[0].keys()
            for path, grad in found[kind].items():
                mean = (means[0][path] + means[1][path]) / 2
                torch.testing.assert_close(grad, mean, rtol=1e-3, atol=1e-6)


def test_what_a_class_keeps_in_float32_is_kept_so_in_shards(folder, one_thread):
    done, _ = together("bfloat", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    model = DiffusionModel(folder / "wan", dispatch=True, dtype="bfloat16")
    settings = {**tiny.CASES["wan"].arguments, "num_inference_steps": ranks.STEPS, "output_type": "latent"}
    alone = model.record(seed=0, **settings)
    for rank in (0, 1):
        found = torch.load(folder / f"bfloat-{rank}.pt", weights_only=True)
        assert found["dtypes"] == ranks.dtypes(model.components["transformer"])
        assert {"torch.float32", "torch.bfloat16"} <= set(found["dtypes"].values())
        torch.testing.assert_close(found["latents"], alone.latents, rtol=0.05, atol=0.05)


def test_a_rank_holds_its_share_and_a_block_more(tmp_path):
    torch.manual_seed(0)
    size = {"num_attention_heads": 8, "attention_head_dim": 48, "num_layers": 12}
    transformer = DiTTransformer2DModel.from_config({**tiny.dit().transformer.config, **size})
    vae = tiny.dit().vae
    DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(tmp_path / "dit")
    # Memory of freed weights is given back, as it always is where they are as large as a real model's.
    done, _ = together("memory", tmp_path, MALLOC_MMAP_THRESHOLD_="65536")
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"memory-{rank}.pt", weights_only=True)
        shares = {what: f"{size / found['whole']:.2f}" for what, size in found.items()}
        print(f"rank {rank}: {shares} of {found['whole']:,} bytes")
        assert len(blocks(transformer)) == 12
        assert found["running"] <= 0.6 * found["whole"]
        # All of the process's memory, with what is read or drawn and let go of again between the shards.
        assert found["loading"] <= 0.7 * found["whole"]
        assert found["drawing"] <= 0.7 * found["whole"]
    spec = {"transformer_cls": "DiTTransformer2DModel"}
    alone = DiffusionModel.from_config(tmp_path / "dit", spec, seed=3).components["transformer"].state_dict()
    for rank in (0, 1):
        drawn = torch.load(tmp_path / f"drawn-{rank}.pt", weights_only=True)
        assert drawn.keys() == dict(transformer.named_parameters()).keys()
        assert [path for path, weight in drawn.items() if not torch.equal(weight, alone[path])] == []


@pytest.mark.parametrize("function", ["failing", "killed"])
def test_a_rank_that_ends_ends_them_all(folder, function):
    (folder / "failed").unlink(missing_ok=True)
    done, ended = together(function, folder)
    assert done.returncode != 0
    assert ended - float((folder / "failed").read_text()) < 30
    assert ("this rank fails" in done.stderr) == (function == "failing")


def test_ranks_that_fail_alike_go_on_and_none_waits_for_one_that_failed_alone(folder, one_thread):
    done, _ = together("parting", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    model = ranks.laid_out(DiffusionModel(folder / "flux", dispatch=True))
    torch.manual_seed(0)
    settings = {**tiny.CASES["flux"].arguments, "num_inference_steps": ranks.STEPS, "output_type": "latent"}
    alone = model.record(**settings).latents
    said = ["ArithmeticError: this rank fails", "RankError: Rank 1 failed .*ArithmeticError: this rank fails"]
    for rank, errors in enumerate(([said[1], said[1]], said)):
        found = torch.load(folder / f"parting-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["noise"], alone)
        assert found["seconds"] < 30
        assert all(re.match(*each) for each in zip(errors, found["errors"], strict=True)), found["errors"]


# What is refused, before anything is loaded


@pytest.mark.parametrize(
    ("entry", "error", "says"),
    [
        ({"tp_sise": 2}, UnknownNameError, "no key 'tp_sise'.*tp_size"),
        ({"_manager_type": "fsdp"}, UnknownNameError, "no _manager_type 'fsdp'.*fsdp2"),
        ({"_manager_type": "ddp", "tp_size": 2}, UnknownNameError, "ddp scheme has no key 'tp_size'"),
        ({"tp_size": "two"}, InputError, "tp_size='two'"),
        ({"tp_size": 0}, InputError, "tp_size=0: .*greater than or equal to 1"),
        ({"cp_size": -3}, InputError, "cp_size=-3"),
        ({"dp_replicate_size": 0}, InputError, "dp_replicate_size=0"),
        ({"_manager_type": "ddp", "world_size": 0}, InputError, "world_size=0"),
        (3, InputError, "is a dict"),
    ],
)
def test_an_entry_that_says_nothing_known_is_refused(entry, error, says):
    with pytest.raises(error, match=says):
        schemes.read({"transformer": entry}, ["transformer", "vae"])


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"cp_size": 2}, "cp_size=2 cannot be done"),
        ({"pp_size": 2}, "pp_size=2 cannot be done"),
        ({"ep_size": 2}, "ep_size=2 cannot be done"),
        ({"tp_size": 2}, "needs a tp_plan"),
        ({"tp_plan": {"a": "colwise"}}, "splits nothing"),
        ({"tp_size": 2, "tp_plan": {"a": "sequence"}}, "sequence_parallel=True"),
        ({"tp_size": 2, "tp_plan": {"a": "colwize"}}, "no style 'colwize'"),
        ({"tp_size": 2, "tp_plan": {"a": 7}}, "7 at a is no style"),
        ({"backend": "nccl"}, "on a CPU it is 'gloo'"),
        ({"backend": "glue"}, "no backend 'glue'.*gloo"),
        ({"tp_size": 4, "tp_plan": {"a": "rowwise"}, "offload_policy": True}, "leaves none"),
        ({"offload_policy": CPUOffloadPolicy()}, "pin_memory=False"),
        ({"world_size": 3}, "there are 4 ranks"),
        ({"dp_size": 3}, "does not fit 4 ranks"),
        ({"dp_replicate_size": 3}, "does not fit 4 ranks"),
        ({"dp_replicate_size": 4}, "leaves nothing to shard"),
    ],
)
def test_a_scheme_that_cannot_be_done_is_refused(entry, says, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    scheme = schemes.read({"transformer": entry}, ["transformer"])["transformer"]
    with pytest.raises((InputError, UnknownNameError), match=says):
        scheme.check("transformer", 4, CPU)


@pytest.mark.parametrize(
    ("entry", "sizes"),
    [
        ({}, (1, 4, 1)),
        ({"dp_replicate_size": 2}, (2, 2, 1)),
        ({"tp_size": 2, "tp_plan": {"a": "rowwise"}}, (1, 2, 2)),
        ({"tp_size": None, "dp_size": 4, "world_size": 4}, (1, 4, 1)),
    ],
)
def test_sizes_that_are_not_said_are_what_is_left(entry, sizes):
    scheme = schemes.read({"transformer": entry}, ["transformer"])["transformer"]
    scheme.check("transformer", 4, CPU)
    assert tuple(scheme.sizes("transformer", 4).values()) == sizes


def test_one_process_alone_is_told_how_to_be_many(folder):
    with pytest.raises(InputError, match="torchrun --nproc-per-node"):
        DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"transformer": {}})


def test_a_model_is_not_built_before_its_scheme_is_read(folder, monkeypatch):
    monkeypatch.setattr("workbench.models.parallel.opening.build", lambda *_, **__: pytest.fail("built"))
    spec = {"transformer_cls": "FluxTransformer2DModel"}
    for build in (DiffusionModel.from_config, NeMoAutoDiffusionPipeline.from_config):
        with pytest.raises(UnknownNameError, match="no key 'tp_sise'"):
            build(str(folder / "flux"), spec, parallel_scheme={"transformer": {"tp_sise": 2}})
        with pytest.raises(InputError, match="torchrun"):
            build(str(folder / "flux"), {**spec, "load_full_pipeline": True}, parallel_scheme={"vae": {}})


@pytest.mark.parametrize(("device", "says"), [("cud", "none of torch's"), ("cuda:99", "CUDA devices")])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(folder, monkeypatch, device, says):
    monkeypatch.setattr("workbench.models.loading.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match=says):
        DiffusionModel.from_pretrained(folder / "flux", device=device)


def test_the_device_is_the_one_given_or_this_ranks_or_the_cpu(monkeypatch):
    assert choose_device("meta") == torch.device("meta")
    assert choose_device(None) == CPU
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(None) == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)


def test_components_stay_where_they_are_if_so_asked(folder):
    moved = []
    for move in (False, None):
        model = DiffusionModel.from_pretrained(folder / "flux", device="meta", move_to_device=move)
        moved.append(model.pipeline.transformer.device.type)
    assert moved == ["cpu", "meta"]


def test_a_component_that_is_not_there_is_refused(folder):
    with pytest.raises(UnknownNameError, match=r"'transfomer'.*transformer"):
        DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"transfomer": {}})
    with pytest.raises(UnknownNameError, match="'unet'"):
        NeMoAutoDiffusionPipeline.from_pretrained(str(folder / "flux"), components_to_load=["unet"])
    with pytest.raises(UnknownNameError, match="'scheduler'"):
        DiffusionModel.from_pretrained(folder / "flux", parallel_scheme={"scheduler": {}})
    with pytest.raises(UnknownNameError, match="'unet'"):
        DiffusionModel.from_pretrained(folder / "flux", components_to_load=["unet"])
    with pytest.raises(LoadError):
        NeMoAutoDiffusionPipeline.from_pretrained(str(folder))


# The signatures of NeMo AutoModel, in one process


def test_a_pipeline_comes_with_its_managers_in_bfloat16(folder):
    pipe, managers = NeMoAutoDiffusionPipeline.from_pretrained(str(folder / "flux"), load_for_training=True)
    assert managers == {}
    assert type(pipe).__name__ == "FluxPipeline"
    assert pipe.transformer.dtype == torch.bfloat16
    assert all(each.requires_grad for each in pipe.transformer.parameters())


def test_only_the_chosen_components_are_made_trainable(folder):
    frozen = tiny.CASES["flux"].build().transformer.requires_grad_(False)
    pipe, _ = NeMoAutoDiffusionPipeline.from_pretrained(
        str(folder / "flux"),
        transformer=frozen,
        torch_dtype=torch.float32,
        load_for_training=True,
        components_to_load=["vae"],
    )
    assert not any(each.requires_grad for each in pipe.transformer.parameters())
    assert all(each.requires_grad for each in pipe.vae.parameters())
    assert make_trainable(frozen) == sum(each.numel() for each in frozen.parameters())


def test_a_denoiser_alone_is_wrapped(folder):
    spec = {"transformer_cls": "FluxTransformer2DModel"}
    pipe, managers = NeMoAutoDiffusionPipeline.from_config(str(folder / "flux"), spec)
    assert isinstance(pipe, NeMoAutoDiffusionPipeline)
    assert list(pipe.components) == ["transformer"]
    assert pipe.transformer.dtype == torch.bfloat16
    assert managers == {}
    with pytest.raises(ValueError, match="transformer_cls"):
        NeMoAutoDiffusionPipeline.from_config(str(folder / "flux"), {})
    assert DiffusionModel(pipe).components.keys() == {"transformer"}
    alone = NeMoAutoDiffusionPipeline(transformer=None, vae=1)
    assert alone.components == {"vae": 1}
    assert alone.transformer is None
    alone.transformer = 2
    assert alone.components == {"vae": 1, "transformer": 2}


def test_the_whole_pipeline_is_built_around_random_weights(folder):
    spec = {"transformer_cls": "FluxTransformer2DModel", "load_full_pipeline": True}
    pipe, _ = NeMoAutoDiffusionPipeline.from_config(str(folder / "flux"), spec, torch_dtype=torch.float32)
    assert type(pipe).__name__ == "FluxPipeline"
    case = tiny.CASES["flux"]
    assert DiffusionModel(pipe).record(seed=0, **case.arguments).images


def test_the_dtype_may_be_called_as_diffusers_does(folder):
    pipe, _ = NeMoAutoDiffusionPipeline.from_pretrained(str(folder / "flux"), dtype=torch.float32)
    assert pipe.transformer.dtype == torch.float32


def test_models_without_a_scheme_have_no_managers(folder):
    model = DiffusionModel.from_pretrained(folder / "flux", device="cpu", load_for_training=True)
    assert model.managers == {}
    assert model.reference == str(folder / "flux")
    assert DiffusionModel(folder / "flux").managers == {}
