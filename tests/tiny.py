"""Tiny pipelines with random weights, made in memory: every family the tracer must take, nothing downloaded.

Each builder returns a live pipeline whose weights are the same every time; `CASES` has, for each, the
arguments of a run well under a second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from workbench.zoo.language import WORDS
from workbench.zoo.tokens import build_tokenizer

WIDTH = 16
"""Width of every text encoder."""

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Builder = Callable[..., Any]


def seeded(build: Builder) -> Builder:
    """Draw the weights from a fixed seed, and leave the global generator as it was."""

    @wraps(build)
    def built(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = build(*args, **kwargs)
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        return pipeline

    return built


@seeded
def sd1(scheduler: type[Any] = DDIMScheduler, **config: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1 in small: a UNet with cross-attention, guidance batched as uncond and cond.

    Args:
        scheduler: the class of the scheduler.
        **config: more of the scheduler's configuration, such as ``prediction_type="v_prediction"``.
    """
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**_unet_config()),
        scheduler=scheduler.from_config({**BETAS, "clip_sample": False, "steps_offset": 1, **config}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@seeded
def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL in small: two text encoders, sizes as extra conditions."""
    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=UNet2DConditionModel(
            **{**_unet_config(), "cross_attention_dim": 2 * WIDTH},
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        ),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


@seeded
def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 in small: a joint transformer (image before text), flow matching, three encoders."""
    tokenizer, words = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokenizer)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(_t5_config(T5Config, words, width=2 * WIDTH)),
        tokenizer_3=words,
    )


@seeded
def flux() -> FluxPipeline:
    """Flux in small: a joint transformer (text before image), guidance by two calls if asked for."""
    tokenizer, words = clip_tokenizer(), t5_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4, shift_factor=0.06),
        text_encoder=CLIPTextModel(_clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(_t5_config(T5Config, words)),
        tokenizer_2=words,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
    )
    pipeline.default_sample_size = 8
    return pipeline


@seeded
def pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma in small: a transformer with cross-attention that also predicts a variance."""
    words = t5_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer=words,
        text_encoder=T5EncoderModel(_t5_config(T5Config, words)),
        vae=_vae(4),
        transformer=PixArtTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(**BETAS),
    )


@seeded
def wan(*, two: bool = False) -> WanPipeline:
    """Wan in small: video, guidance by two calls; with ``two``, a second transformer for the late steps."""
    words = t5_tokenizer()
    return WanPipeline(
        tokenizer=words,
        text_encoder=UMT5EncoderModel(_t5_config(UMT5Config, words)),
        vae=AutoencoderKLWan(
            base_dim=3,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        transformer=_wan_transformer(),
        transformer_2=_wan_transformer() if two else None,
        boundary_ratio=0.9 if two else None,
    )


def wan22() -> WanPipeline:
    """Wan 2.2 in small: the second transformer takes over in mid-run."""
    return wan(two=True)


@seeded
def ddpm() -> DDPMPipeline:
    """An unconditional pipeline: no words, no callback."""
    return DDPMPipeline(
        unet=UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        scheduler=DDPMScheduler(),
    )


@seeded
def dit() -> DiTPipeline:
    """A class-conditional transformer: no words, guidance batched as cond and uncond."""
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            num_embeds_ada_norm=1000,
        ),
        vae=_vae(4),
        scheduler=DDIMScheduler(clip_sample=False),
    )


@dataclass(frozen=True)
class Case:
    """A pipeline and a short run of it.

    Attributes:
        build: makes the pipeline.
        arguments: everything for one call but the generator.
        site: a block in the middle of a denoiser whose output is one tensor.
    """

    build: Builder
    arguments: dict[str, Any]
    site: str


SQUARE = {"height": 16, "width": 16}
WORDED = {"prompt": "a red circle", "num_inference_steps": 4}
UNBINNED = {"use_resolution_binning": False, "clean_caption": False}

CASES: dict[str, Case] = {
    "sd1": Case(sd1, WORDED, "unet.mid_block"),
    "sdxl": Case(sdxl, WORDED, "unet.mid_block"),
    "sd3": Case(sd3, {**WORDED, "max_sequence_length": 24}, "transformer.transformer_blocks.0.ff"),
    "flux": Case(
        flux, {**WORDED, **SQUARE, "max_sequence_length": 24}, "transformer.transformer_blocks.0.ff"
    ),
    "flux-cfg": Case(
        flux,
        {
            **WORDED,
            **SQUARE,
            "max_sequence_length": 24,
            "true_cfg_scale": 3.0,
            "negative_prompt": "a blue square",
        },
        "transformer.transformer_blocks.0.ff",
    ),
    "pixart": Case(
        pixart,
        {**WORDED, **SQUARE, **UNBINNED, "max_sequence_length": 24},
        "transformer.transformer_blocks.0",
    ),
    "wan": Case(
        wan,
        {**WORDED, **SQUARE, "num_frames": 5, "max_sequence_length": 24, "output_type": "np"},
        "transformer.blocks.0",
    ),
    "wan22": Case(
        wan22,
        {**WORDED, **SQUARE, "num_frames": 5, "max_sequence_length": 24, "output_type": "np"},
        "transformer_2.blocks.0",
    ),
    "ddpm": Case(ddpm, {"num_inference_steps": 4}, "unet.mid_block"),
    "dit": Case(dit, {"class_labels": [3], "num_inference_steps": 4}, "transformer.transformer_blocks.0"),
}


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows the words of the shapes world; 24 tokens a prompt."""
    return build_tokenizer()


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows the words of the shapes world, and spells all others."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS]
    pieces += [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=24)


def _vae(channels: int, **config: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def _unet_config() -> dict[str, Any]:
    return {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }


def _clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_config(kind: type[Any], tokenizer: T5Tokenizer, *, width: int = WIDTH) -> Any:
    return kind(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
    )


def _wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
