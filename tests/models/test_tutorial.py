"""Both loops of diffusers' tutorial on taking a pipeline apart, on the models that come with the package.

They are written as there; only the ids, the sizes and the scaling constants are others.
"""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

import workbench as wb
from workbench.zoo import shapes

DDPM, STABLE = wb.zoo.path("shapes-ddpm"), wb.zoo.path("shapes-unet")


def as_image(sample):
    image = (sample / 2 + 0.5).clamp(0, 1).squeeze()
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy())


@pytest.fixture(scope="module")
def parts():
    """The parts of the first loop."""
    return {
        "scheduler": DDPMScheduler.from_pretrained(DDPM, subfolder="scheduler"),
        "model": UNet2DModel.from_pretrained(DDPM, subfolder="unet"),
    }


def ddpm(parts):
    """Return the first loop, over its parts."""
    scheduler, model = parts["scheduler"], parts["model"]

    def loop(generator=None, num_inference_steps=50):
        scheduler.set_timesteps(num_inference_steps)
        sample_size = model.config.sample_size
        sample = torch.randn((1, 3, sample_size, sample_size), generator=generator)
        for t in scheduler.timesteps:
            with torch.no_grad():
                noisy_residual = model(sample, t).sample
            sample = scheduler.step(noisy_residual, t, sample, generator=generator).prev_sample
        return as_image(sample)

    return loop


def test_the_loop_of_ddpm(parts):
    loop = ddpm(parts)
    plain = loop(torch.Generator("cpu").manual_seed(0))
    model = wb.trace_loop(loop, components=parts)
    run = model.record(seed=0, capture=["model.mid_block"])
    assert run.images[0].tobytes() == plain.tobytes()
    assert len(run.ledger) == 50
    assert run["model.mid_block"].shape[0] == 50
    assert run.fork(30).images[0].tobytes() == plain.tobytes()
    other = model.record(seed=1, capture=["model.mid_block"])
    patched = model.record(seed=0, interventions=[wb.Patch("model.mid_block", source=other, steps=range(20))])
    assert patched.images[0].tobytes() != plain.tobytes()


def test_what_it_draws_is_coloured_on_dark_or_light(parts):
    loop = ddpm(parts)
    for seed in range(3):
        picture = loop(torch.Generator("cpu").manual_seed(seed))
        pixels = np.asarray(picture, np.float32)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean(0)
        assert edge.max() < 70 or edge.min() > 200
        assert 1 <= len(shapes.read(picture).things) <= 4


def test_the_loop_of_ddpm_where_it_stands(parts):
    scheduler, unet = parts["scheduler"], parts["model"]
    model = wb.trace_loop(ddpm(parts), components=parts)
    with model.trace_loop(capture=["model.mid_block"]) as run:
        scheduler.set_timesteps(5)
        sample = torch.randn((1, 3, 64, 64), generator=torch.Generator("cpu").manual_seed(0))
        for t in scheduler.timesteps:
            with torch.no_grad():
                noisy_residual = unet(sample, t).sample
            sample = scheduler.step(noisy_residual, t, sample).prev_sample
    assert run.record.ledger.steps == 5
    assert torch.equal(run.record.latents[-1], sample)


def test_the_loop_of_stable_diffusion():
    vae = AutoencoderKL.from_pretrained(STABLE, subfolder="vae")
    tokenizer = CLIPTokenizer.from_pretrained(STABLE, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(STABLE, subfolder="text_encoder")
    unet = UNet2DConditionModel.from_pretrained(STABLE, subfolder="unet")
    scheduler = UniPCMultistepScheduler.from_pretrained(STABLE, subfolder="scheduler")

    torch_device = "cpu"
    vae.to(torch_device)
    text_encoder.to(torch_device)
    unet.to(torch_device)

    height, width = 64, 64
    num_inference_steps = 20
    guidance_scale = 3.0
    batch_size = 1

    def loop(prompt):
        text_input = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            text_embeddings = text_encoder(text_input.input_ids.to(torch_device))[0]
        max_length = text_input.input_ids.shape[-1]
        uncond_input = tokenizer(
            [""] * batch_size, padding="max_length", max_length=max_length, return_tensors="pt"
        )
        uncond_embeddings = text_encoder(uncond_input.input_ids.to(torch_device))[0]
        text_embeddings = torch.cat([uncond_embeddings, text_embeddings])

        latents = torch.randn(
            (batch_size, unet.config.in_channels, height // 4, width // 4), device=torch_device
        )
        latents = latents * scheduler.init_noise_sigma

        scheduler.set_timesteps(num_inference_steps)
        for t in tqdm(scheduler.timesteps):
            latent_model_input = torch.cat([latents] * 2)
            latent_model_input = scheduler.scale_model_input(latent_model_input, timestep=t)
            with torch.no_grad():
                noise_pred = unet(latent_model_input, t, encoder_hidden_states=text_embeddings).sample
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
            latents = scheduler.step(noise_pred, t, latents).prev_sample

        latents = 1 / vae.config.scaling_factor * latents
        with torch.no_grad():
            image = vae.decode(latents).sample
        image = (image / 2 + 0.5).clamp(0, 1).squeeze()
        image = (image.permute(1, 2, 0) * 255).to(torch.uint8).cpu().numpy()
        return Image.fromarray(image)

    parts = {
        "vae": vae,
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "unet": unet,
        "scheduler": scheduler,
    }
    torch.manual_seed(0)
    plain = loop(["a red circle"])
    model = wb.trace_loop(loop, components=parts)
    site = "unet.up_blocks.2"
    red = model.record("a red circle", seed=0, capture=[site])
    assert red.images[0].tobytes() == plain.tobytes()
    assert red.ledger.branches == ("uncond", "cond")
    (thing,) = shapes.read(red.images[0]).things
    assert thing.pair == ("red", "circle")
    patch = wb.Patch(site, source=red, branch="cond")
    assert model.record("a blue circle", seed=0, interventions=[patch]).images[0].tobytes() == plain.tobytes()
    assert red.fork(10).images[0].tobytes() == plain.tobytes()
