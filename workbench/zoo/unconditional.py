"""The recipe of ``shapes-ddpm``: the shapes world without words, in pixels, as Ho et al. (2020) have it."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from workbench.zoo.autoencoder import mixed_precision, to_tensor
from workbench.zoo.drawing import render_many
from workbench.zoo.world import SIDE, sample


def build_unconditional() -> UNet2DModel:
    """Make the denoiser, untrained: (batch, 3, 64, 64) there and back, attention at 16 x 16 and 8 x 8."""
    return UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
    )


def build_ddpm_scheduler() -> DDPMScheduler:
    """Make the noise schedule: a thousand linear steps, the velocity predicted.

    With the noise predicted, as in the paper, a run this short learns outlines and edges and not how many
    objects there are, nor that the ground is dark or light: near pure noise the error hardly depends on them.
    """
    return DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="linear", prediction_type="v_prediction", clip_sample=True
    )


def assemble_unconditional(unet: UNet2DModel) -> DDPMPipeline:
    """Put the parts into a pipeline."""
    pipeline = DDPMPipeline(unet, build_ddpm_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_images(count: int, seed: int) -> Tensor:
    """Draw scenes, (count, 64, 64, 3) bytes."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(render_many([sample(rng) for _ in range(count)]))


def noise_loss(
    unet: UNet2DModel, scheduler: DDPMScheduler, images: Tensor, size: int, seed: int, step: int
) -> Tensor:
    """Mean squared error of the predicted velocity (Salimans & Ho, 2022).

    Args:
        unet: the denoiser.
        scheduler: of the noise.
        images: what is drawn from, (images, 64, 64, 3) bytes.
        size: of the batch.
        seed: of the training.
        step: of the training; the same step of the same seed is the same batch.
    """
    rng = np.random.default_rng([seed, step])
    clean = to_tensor(images[torch.from_numpy(rng.integers(len(images), size=size))].numpy())
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    noise = torch.randn(clean.shape, generator=generator)
    times = torch.randint(1000, (size,), generator=generator)
    with mixed_precision():
        predicted = unet(scheduler.add_noise(clean, noise, times), times).sample
    velocity = scheduler.get_velocity(clean, noise, times)
    loss: Tensor = (predicted.float() - velocity).square().mean()
    return loss
