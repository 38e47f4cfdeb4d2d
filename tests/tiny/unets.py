"""Pipelines around a UNet."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny.parts import BETAS, WIDTH, clip_config, clip_tokenizer, seeded, unet_config, vae

UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@seeded
def sd1(scheduler: type[Any] = DDIMScheduler, **config: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1 in small: a UNet with cross-attention, guidance batched as uncond and cond.

    Args:
        scheduler: the class of the scheduler.
        **config: more of the scheduler's configuration, such as ``prediction_type="v_prediction"``.
    """
    return StableDiffusionPipeline(**_sd1_parts(scheduler, **config), **UNCHECKED)


@seeded
def sd1_from_image(scheduler: type[Any] = DDIMScheduler, **config: Any) -> StableDiffusionImg2ImgPipeline:
    """Image to image: the steps begin in the middle of the scheduler's list."""
    return StableDiffusionImg2ImgPipeline(**_sd1_parts(scheduler, **config), **UNCHECKED)


@seeded
def sd1_inpaint(scheduler: type[Any] = DDIMScheduler, **config: Any) -> StableDiffusionInpaintPipeline:
    """Inpainting: the UNet also sees the mask and the masked picture, nine channels in all."""
    parts = _sd1_parts(scheduler, **config)
    parts["unet"] = UNet2DConditionModel(**{**unet_config(), "in_channels": 9})
    return StableDiffusionInpaintPipeline(**parts, **UNCHECKED)


@seeded
def pix2pix() -> StableDiffusionInstructPix2PixPipeline:
    """Guided by words and by an image: three ways in a batch, four channels more for the image."""
    parts = _sd1_parts(DDIMScheduler)
    parts["unet"] = UNet2DConditionModel(**{**unet_config(), "in_channels": 8})
    return StableDiffusionInstructPix2PixPipeline(**parts, **UNCHECKED)


@seeded
def sd1_pag() -> StableDiffusionPAGPipeline:
    """Perturbed-attention guidance: a third way in the batch, or a second without the first."""
    return StableDiffusionPAGPipeline(**_sd1_parts(DDIMScheduler), **UNCHECKED, pag_applied_layers="mid")


@seeded
def controlnet() -> StableDiffusionControlNetPipeline:
    """A ControlNet beside the UNet: it is called with a timestep too, and denoises nothing."""
    parts = _sd1_parts(DDIMScheduler)
    beside = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
    return StableDiffusionControlNetPipeline(**parts, controlnet=beside, **UNCHECKED)


@seeded
def animatediff() -> AnimateDiffPipeline:
    """AnimateDiff in small: a UNet with motion modules, frames folded into the batch inside."""
    parts = _sd1_parts(DDIMScheduler)
    motion = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
    )
    return AnimateDiffPipeline(**parts, motion_adapter=motion)


@seeded
def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL in small: two text encoders, sizes as extra conditions."""
    return StableDiffusionXLPipeline(**sdxl_parts(), add_watermarker=False)


def sdxl_parts() -> dict[str, Any]:
    """The components of SDXL."""
    tokenizer = clip_tokenizer()
    return {
        "vae": vae(4),
        "text_encoder": CLIPTextModel(clip_config(tokenizer)),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config(tokenizer)),
        "tokenizer": tokenizer,
        "tokenizer_2": clip_tokenizer(),
        "unet": UNet2DConditionModel(
            **{**unet_config(), "cross_attention_dim": 2 * WIDTH},
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        "scheduler": DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    }


@seeded
def ddpm() -> DDPMPipeline:
    """An unconditional pipeline: no words, no callback."""
    return DDPMPipeline(unet=_pixel_unet(), scheduler=DDPMScheduler())


@seeded
def ddim() -> DDIMPipeline:
    """The same by DDIM, with noise at each step where ``eta`` is above zero."""
    return DDIMPipeline(unet=_pixel_unet(), scheduler=DDIMScheduler())


def _sd1_parts(scheduler: type[Any], **config: Any) -> dict[str, Any]:
    tokenizer = clip_tokenizer()
    return {
        "vae": vae(4),
        "text_encoder": CLIPTextModel(clip_config(tokenizer)),
        "tokenizer": tokenizer,
        "unet": UNet2DConditionModel(**unet_config()),
        "scheduler": scheduler.from_config({**BETAS, "clip_sample": False, "steps_offset": 1, **config}),
    }


def _pixel_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
