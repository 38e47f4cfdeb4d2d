import hashlib
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from workbench.errors import InputError
from workbench.zoo import train
from workbench.zoo.autoencoder import to_tensor
from workbench.zoo.denoiser import draw_batch, encode_pool
from workbench.zoo.shapes import render
from workbench.zoo.training import Average, Recipe

TINY = Recipe(vae_steps=2, images=64, steps=4, batch=4, scenes=16, keep_every=2)


def weights(folder):
    return {
        file.relative_to(folder): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*.safetensors")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, train.train_shapes_unet(out, TINY)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(whole, tmp_path, monkeypatch):
    draw = train.draw_batch

    def stop_at_three(*arguments):
        if arguments[-1] == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    shutil.copytree(whole[0] / "vae", tmp_path / "vae")
    monkeypatch.setattr(train, "draw_batch", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        train.train_shapes_unet(tmp_path, TINY)
    stopped = weights(tmp_path / "export")
    monkeypatch.undo()
    assert weights(train.train_shapes_unet(tmp_path, TINY)) == weights(whole[1])
    assert stopped != weights(whole[1])


def test_a_run_can_begin_with_the_weights_of_another(whole, tmp_path):
    still = Recipe(steps=1, batch=4, scenes=16, keep_every=1, rate=0.0, seed=9)
    went_on = train.train_shapes_unet(tmp_path, still, whole[1])
    for file in whole[1].rglob("*.safetensors"):
        before, after = load_file(file), load_file(went_on / file.relative_to(whole[1]))
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not (tmp_path / "vae").exists()


def test_the_export_opens_as_a_pipeline_of_one_type(whole):
    pipeline = StableDiffusionPipeline.from_pretrained(whole[1])
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {part.dtype for part in parts} == {torch.float32}
    assert not pipeline.config.requires_safety_checker


def test_the_pool_holds_the_latents_of_its_scenes(whole):
    pipeline = StableDiffusionPipeline.from_pretrained(whole[1])
    pool = encode_pool(pipeline.vae, 6, 0, chunk=4)
    image = to_tensor(render(pool.scenes[5])[None])
    latents = pipeline.vae.encode(image).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert pool.latents.shape == (6, 4, 16, 16)
    assert torch.allclose(pool.latents[5], latents[0], atol=0.1)
    assert not torch.allclose(pool.latents[4], latents[0], atol=0.1)


def test_pairs_can_be_drawn_oftener(whole):
    pipeline = StableDiffusionPipeline.from_pretrained(whole[1])
    drawn = [encode_pool(pipeline.vae, 12, 0, pairs=pairs).scenes for pairs in (0.0, 1.0)]
    assert {len(scene.things) for scene in drawn[0]} == {1, 2}
    assert {len(scene.things) for scene in drawn[1]} == {2}


def test_twins_are_seen_with_the_empty_prompt_alone(whole):
    pipeline = StableDiffusionPipeline.from_pretrained(whole[1])
    pool = encode_pool(pipeline.vae, 24, 0, twins=0.5)
    twins = [scene.twins for scene in pool.scenes]
    assert 4 < sum(twins) < 20
    batch = draw_batch(pool, pipeline.tokenizer, 64, 0, 0, empty=0.0)
    empty = pipeline.tokenizer("", padding="max_length", max_length=24, return_tensors="pt").input_ids
    chosen = np.random.default_rng([0, 0]).integers(len(pool.scenes), size=64)
    assert [bool((row == empty[0]).all()) for row in batch.ids] == [twins[index] for index in chosen]


def test_the_world_without_words_is_trained_and_goes_on(tmp_path):
    tiny = Recipe(steps=2, batch=2, scenes=4, keep_every=1)
    first = train.train_shapes_ddpm(tmp_path / "a", tiny)
    pipeline = DDPMPipeline.from_pretrained(first)
    assert pipeline.unet.config.sample_size == 64
    assert sum(file.stat().st_size for file in first.rglob("*.safetensors")) < 4e6
    still = Recipe(steps=1, batch=2, scenes=4, rate=0.0)
    again = DDPMPipeline.from_pretrained(train.train_shapes_ddpm(tmp_path / "b", still, first))
    pairs = zip(pipeline.unet.parameters(), again.unet.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("model", "number"), [("shapes-ddpm", "twins"), ("shapes-mmdit", "images"), ("shapes-planted", "images")]
)
def test_numbers_that_a_recipe_does_not_take_are_refused(model, number):
    with pytest.raises(InputError, match=f"{model} nothing takes {number}"):
        train.main([model, f"--{number}", "1"])


def test_the_average_follows_the_weights_faster_at_first():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    average = Average(model, decay=0.99)
    torch.nn.init.ones_(model.weight)
    average.update(model, 0)
    assert average.weights["weight"].item() == pytest.approx(0.9)
    average.update(model, 10_000)
    assert average.weights["weight"].item() == pytest.approx(0.901)


def test_a_recipe_that_does_not_exist_names_those_that_do():
    with pytest.raises(InputError, match=r"'shape-unet'.*'shapes-unet'"):
        train.main(["shape-unet"])
