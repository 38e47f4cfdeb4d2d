"""The recipe of the autoencoder: 64 x 64 images to latents of 4 x 16 x 16, and back."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from workbench.zoo.drawing import render_many
from workbench.zoo.world import SIDE, sample

log = logging.getLogger(__name__)


def build_autoencoder() -> AutoencoderKL:
    """Make the autoencoder, untrained: 0.9 M parameters, latents of (batch, 4, 16, 16)."""
    channels = (32, 64, 64)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=SIDE,
    )


def mixed_precision() -> torch.autocast:
    """Compute in bfloat16 where the processor does; where it does not, that is many times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def to_tensor(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """Turn (batch, height, width, 3) bytes into (batch, 3, height, width) from -1 to 1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def image_batches(seed: int, size: int, pool: int) -> Iterator[Tensor]:
    """Draw training images without end.

    Args:
        seed: of the scenes and of the order.
        size: images in a batch.
        pool: how many images are rendered; batches are drawn from them.

    Yields:
        (size, 3, 64, 64) from -1 to 1.
    """
    rng = np.random.default_rng(seed)
    images = render_many([sample(rng) for _ in range(pool)])
    while True:
        yield to_tensor(images[rng.integers(pool, size=size)])


def train_autoencoder(
    steps: int, seed: int, *, pool: int = 20_000, batch: int = 32, rate: float = 2e-3
) -> AutoencoderKL:
    """Train the autoencoder on drawn scenes, and set its scaling factor to what it learnt.

    Args:
        steps: optimiser steps.
        seed: of the weights, the scenes and the noise.
        pool: how many images are rendered to draw from.
        batch: images a step.
        rate: the highest learning rate of the one-cycle schedule.

    Returns:
        The trained autoencoder, in float32 and evaluation mode.
    """
    torch.manual_seed(seed)
    vae = build_autoencoder().train()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step, images in zip(range(1, steps + 1), image_batches(seed, batch, pool), strict=False):
        loss, error = _loss(vae, images)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            pace = (time.monotonic() - started) / step
            log.info("vae %5d/%d  PSNR %.1f dB  %.2f s a step", step, steps, _decibels(error), pace)
    vae.eval()
    vae.register_to_config(scaling_factor=_scaling_factor(vae, seed + 1))
    log.info("vae scaling factor %.4f, held-out PSNR %.1f dB", vae.config.scaling_factor, psnr(vae, seed + 1))
    return vae


def _loss(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, float]:
    """L1 + MSE + 1e-3 KL; also the mean squared error alone."""
    with mixed_precision():
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    difference = decoded.float() - images
    squared = difference.square().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return difference.abs().mean() + squared + 1e-3 * divergence, float(squared.detach())


def _decibels(squared_error: float) -> float:
    return float(10 * np.log10(4 / squared_error))


@torch.no_grad()
def _scaling_factor(vae: AutoencoderKL, seed: int) -> float:
    images = next(image_batches(seed, 512, 512))
    return float(1 / vae.encode(images).latent_dist.sample().std())


@torch.no_grad()
def psnr(vae: AutoencoderKL, seed: int, count: int = 128) -> float:
    """How well images come back through the mean of their latents, in decibels of the whole range."""
    images = next(image_batches(seed, count, count))
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    return _decibels(float(functional.mse_loss(decoded, images)))


def load_or_train(folder: Path, steps: int, seed: int, pool: int) -> AutoencoderKL:
    """Open the autoencoder kept in ``folder``, or train it and keep it there."""
    if (folder / "config.json").exists():
        log.info("autoencoder found in %s", folder)
        return AutoencoderKL.from_pretrained(folder).eval()
    vae = train_autoencoder(steps, seed, pool=pool)
    vae.save_pretrained(folder)
    return vae
