"""The recipe of the denoiser and its text encoder, trained together on the autoencoder's latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from workbench.zoo.autoencoder import mixed_precision, to_tensor
from workbench.zoo.drawing import render_many
from workbench.zoo.tokens import LENGTH
from workbench.zoo.world import Scene, sample, sample_wording

WIDTH = 96
"""Width of the text encoder, and of what cross-attention attends to."""


def text_config(tokenizer: CLIPTokenizer, layers: int = 3) -> CLIPTextConfig:
    """Describe the text encoder of a tokenizer, (batch, 24, 96)."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make the text encoder, untrained."""
    return CLIPTextModel(text_config(tokenizer))


def build_unet() -> UNet2DConditionModel:
    """Make the denoiser, untrained: cross-attention at 16 x 16, 8 x 8 and 4 x 4."""
    channels = (48, 96, 128)
    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 4, 4),
    )


def build_scheduler() -> DDIMScheduler:
    """Make the noise schedule that is trained on: a thousand scaled-linear steps."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def build_sampler() -> DPMSolverMultistepScheduler:
    """Make the scheduler that samples: DPM-Solver++ (Lu et al., 2022) on the same noise.

    Of twenty steps it makes better use than DDIM, which gets one prompt in fifty more wrong.
    """
    config = build_scheduler().config
    sampler: DPMSolverMultistepScheduler = DPMSolverMultistepScheduler.from_config(config)
    return sampler


def assemble(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Put the parts into a pipeline without safety checker."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_sampler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(frozen=True)
class Pool:
    """Scenes and their scaled latents, (scenes, 4, 16, 16)."""

    scenes: Sequence[Scene]
    latents: Tensor


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, count: int, seed: int, *, pairs: float = 0.0, twins: float = 0.0, chunk: int = 250
) -> Pool:
    """Draw scenes and encode them once, so that training the denoiser needs no autoencoder.

    Args:
        vae: what encodes them.
        count: how many.
        seed: of the drawing.
        pairs: share of them that must have two objects, the harder ones.
        twins: share of them that are two objects of one colour and shape.
        chunk: how many are encoded at a time.
    """
    scenes, parts = draw_scenes(count, seed, pairs, twins), []
    for start in range(0, count, chunk):
        images = to_tensor(render_many(scenes[start : start + chunk]))
        with mixed_precision():
            mean = vae.encode(images).latent_dist.mean
        parts.append(mean.float() * vae.config.scaling_factor)
    return Pool(scenes, torch.cat(parts))


def draw_scenes(count: int, seed: int, pairs: float, twins: float) -> list[Scene]:
    """Draw the scenes of a pool; as `encode_pool`."""
    rng = np.random.default_rng(seed)
    return [
        sample(rng, twins=True)
        if rng.random() < twins
        else sample(rng, objects=2 if rng.random() < pairs else None)
        for _ in range(count)
    ]


@dataclass(frozen=True)
class Batch:
    """What one step trains on: ids (batch, 24), latents and noise (batch, 4, 16, 16), timesteps (batch,)."""

    ids: Tensor
    latents: Tensor
    noise: Tensor
    timesteps: Tensor


def draw_timesteps(size: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps, (size,): half of them anywhere, half where colour and shape are decided."""
    anywhere = torch.randint(1000, (size,), generator=generator)
    deciding = torch.randint(550, 1000, (size,), generator=generator)
    return torch.where(torch.arange(size) % 2 == 0, anywhere, deciding)


def draw_batch(
    pool: Pool,
    tokenizer: CLIPTokenizer,
    size: int,
    seed: int,
    step: int,
    *,
    empty: float = 0.1,
    times: Callable[[int, torch.Generator], Tensor] = draw_timesteps,
) -> Batch:
    """Draw the batch of a step; the same step of the same seed is the same batch, also after a restart.

    Twins are only ever seen with the empty prompt: what it expects and a prompt does not, guidance steers
    away from, and two objects of one kind for two kinds is what goes wrong most.

    Args:
        pool: where the scenes come from.
        tokenizer: of the prompts.
        size: scenes in the batch.
        seed: of the training.
        step: of the training.
        empty: share of prompts left empty, for classifier-free guidance.
        times: draws the timesteps, from 0 to 1000, given how many.
    """
    rng = np.random.default_rng([seed, step])
    chosen = rng.integers(len(pool.scenes), size=size)
    prompts = [
        "" if scene.twins or rng.random() < empty else scene.prompt(sample_wording(rng))
        for scene in (pool.scenes[index] for index in chosen)
    ]
    ids = tokenizer(
        prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    latents = pool.latents[torch.from_numpy(chosen)]
    noise = torch.randn(latents.shape, generator=generator)
    return Batch(ids, latents, noise, times(size, generator))


def denoising_loss(
    text_encoder: CLIPTextModel, unet: UNet2DConditionModel, scheduler: DDIMScheduler, batch: Batch
) -> Tensor:
    """Mean squared error of the predicted velocity (Salimans & Ho, 2022), evened out over the timesteps.

    The error is divided by about what it comes to at each: near pure noise most of it is the objects' places,
    which no words tell, and would drown the little that shapes make of it further on.
    """
    noisy = scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    velocity = scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
    with mixed_precision():
        text = text_encoder(batch.ids).last_hidden_state
        predicted = unet(noisy, batch.timesteps, text).sample
    error = (predicted.float() - velocity).square().mean((1, 2, 3))
    usual = 0.04 + 0.4 * (batch.timesteps / 1000) ** 4
    loss: Tensor = (error / usual).mean()
    return loss
