import logging

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from workbench import zoo
from workbench.attention.words import tokenize
from workbench.zoo import train
from workbench.zoo.denoiser import Batch
from workbench.zoo.mmdit import PERTURBATION, SILENT_ROWS, draw_times, flow_loss, read_text, silent_rows
from workbench.zoo.training import Recipe

PROMPTS = ["a red circle left of a small blue square", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tiny = Recipe(steps=2, batch=2, scenes=4, keep_every=1)
    return train.train_shapes_mmdit(tmp_path_factory.mktemp("mmdit"), tiny)


@pytest.fixture(scope="module")
def pipeline(folder):
    opened = DiffusionPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    return opened


def draw(pipeline, **settings):
    generator = torch.Generator("cpu").manual_seed(0)
    image = pipeline(PROMPTS[0], num_inference_steps=2, generator=generator, **settings).images[0]
    return np.asarray(image).astype(int)


def test_the_export_opens_as_stable_diffusion_3_without_a_word(folder, caplog, capsys):
    for library in ("diffusers", "transformers"):
        logging.getLogger(library).addHandler(caplog.handler)
    try:
        opened = DiffusionPipeline.from_pretrained(folder)
        opened("a red circle", num_inference_steps=1)
    finally:
        for library in ("diffusers", "transformers"):
            logging.getLogger(library).removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == []
    assert type(opened) is StableDiffusion3Pipeline
    modules = [part for part in opened.components.values() if isinstance(part, torch.nn.Module)]
    assert {module.dtype for module in modules} == {torch.float32}
    assert len(modules) == 5


def test_the_folder_is_small_enough_to_ship(folder):
    assert 15e6 < sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 20e6


@pytest.mark.parametrize("rows", [24, SILENT_ROWS])
def test_training_feeds_the_transformer_what_the_pipeline_does(pipeline, rows):
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        fed, pooled = read_text((pipeline.text_encoder, pipeline.text_encoder_2), ids, rows)
        wanted, _, wanted_pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=rows
        )
    assert fed.shape == (2, 24 + rows, 192)
    assert torch.equal(fed, wanted)
    assert torch.equal(pooled, wanted_pooled)
    assert not torch.equal(fed[0], fed[1])


def test_the_silent_encoder_is_what_the_pipeline_has_without_one(folder, pipeline):
    without = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    without.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipeline), draw(without))
    words = tokenize(pipeline.tokenizer_3, "a red circle").words
    assert all(word.special for word in words)  # nothing that could be taken for the prompt's words
    assert not np.array_equal(draw(pipeline), draw(pipeline, max_sequence_length=24))


def test_a_run_can_begin_with_the_weights_of_another(folder, pipeline, tmp_path):
    still = Recipe(steps=1, batch=2, scenes=4, rate=0.0, seed=5)
    again = DiffusionPipeline.from_pretrained(train.train_shapes_mmdit(tmp_path, still, folder))
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        pairs = zip(pipeline.components[name].parameters(), again.components[name].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_the_autoencoder_is_that_of_shapes_unet(pipeline):
    other = DiffusionPipeline.from_pretrained(zoo.path("shapes-unet")).vae
    assert pipeline.vae.config.scaling_factor == other.config.scaling_factor
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(pipeline.vae.decode(latents).sample, other.decode(latents).sample)


def test_times_are_drawn_where_the_scheduler_takes_its_steps(pipeline):
    times = draw_times(20_000, torch.Generator().manual_seed(0))
    pipeline.scheduler.set_timesteps(21)
    assert 0 < times.min() < times.max() < 1000
    assert times.median() == pytest.approx(float(pipeline.scheduler.timesteps[10]), rel=0.02)
    assert times.median() > 700


def test_every_eighth_step_has_the_rows_that_the_pipeline_adds():
    assert [silent_rows(step) for step in range(16)] == ([0] * 7 + [256]) * 2


def test_the_loss_is_of_the_flow_from_image_to_noise(pipeline):
    seen = []
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    latents, noise = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ids = pipeline.tokenizer(["a", "b", "c"], padding="max_length", return_tensors="pt").input_ids
    batch = Batch(ids, latents, noise, torch.tensor([0.0, 500.0, 1000.0]))

    def knowing(noisy, text, pooled, times, off=0.0):
        seen.append(noisy)
        return type("Output", (), {"sample": noise - latents + off})

    assert flow_loss(encoders, knowing, batch, 0).item() == 0
    given = noise + PERTURBATION * noise[[2, 0, 1]]  # of another scene
    assert torch.allclose(seen[0], torch.stack([latents[0], (latents[1] + given[1]) / 2, given[2]]))
    wrong = flow_loss(encoders, lambda *given: knowing(*given, off=1.0), batch, 0).item()
    assert wrong == pytest.approx(np.mean([1 / 0.07, 1 / (0.07 + 0.6 / 32), 1 / 0.67]), rel=1e-4)
