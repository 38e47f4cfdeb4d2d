"""Pictures by transformers."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    LuminaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny.parts import (
    BETAS,
    WIDTH,
    clip_config,
    clip_tokenizer,
    gemma,
    gemma_tokenizer,
    qwen_tokenizer,
    seeded,
    t5_config,
    t5_tokenizer,
    vae,
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
        vae=vae(4),
        scheduler=DDIMScheduler(clip_sample=False),
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
        vae=vae(4, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=T5EncoderModel(t5_config(T5Config, words, width=2 * WIDTH)),
        tokenizer_3=words,
    )


@seeded
def flux() -> FluxPipeline:
    """Flux in small: a joint transformer (text before image), guidance by two calls if asked for."""
    pipeline = FluxPipeline(**_flux_parts())
    pipeline.default_sample_size = 8
    return pipeline


@seeded
def flux_from_image() -> FluxImg2ImgPipeline:
    """Flux from an image: the steps begin in the middle of the scheduler's list."""
    return FluxImg2ImgPipeline(**_flux_parts())


def _flux_parts() -> dict[str, Any]:
    tokenizer, words = clip_tokenizer(), t5_tokenizer()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae(4, shift_factor=0.06),
        "text_encoder": CLIPTextModel(clip_config(tokenizer)),
        "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(t5_config(T5Config, words)),
        "tokenizer_2": words,
        "transformer": FluxTransformer2DModel(
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
    }


@seeded
def pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma in small: a transformer with cross-attention that also predicts a variance."""
    words = t5_tokenizer()
    return PixArtSigmaPipeline(
        tokenizer=words,
        text_encoder=T5EncoderModel(t5_config(T5Config, words)),
        vae=vae(4),
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
def sana() -> SanaPipeline:
    """Sana in small: linear attention, a language model as its text encoder."""
    letters = gemma_tokenizer()
    both = {"block_types": "ResBlock", "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
    return SanaPipeline(
        tokenizer=letters,
        text_encoder=gemma(letters),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in both.items()},
        ),
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=16,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@seeded
def auraflow() -> AuraFlowPipeline:
    """AuraFlow in small: joint blocks, then single ones; its time runs the other way."""
    words = t5_tokenizer()
    return AuraFlowPipeline(
        tokenizer=words,
        text_encoder=UMT5EncoderModel(t5_config(UMT5Config, words)),
        vae=vae(4),
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pos_embed_max_size=64,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@seeded
def qwen() -> QwenImagePipeline:
    """Qwen-Image in small: guidance by two calls, a model of pictures and words as its text encoder."""
    letters = qwen_tokenizer()
    layers = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2}
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    **layers,
                    "vocab_size": len(letters),
                    "num_hidden_layers": 2,
                    "num_key_value_heads": 2,
                    "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": WIDTH,
                    "intermediate_size": WIDTH,
                    "num_heads": 2,
                    "out_hidden_size": WIDTH,
                },
            )
        ),
        tokenizer=letters,
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 4, 4),
        ),
    )


@seeded
def z_image() -> ZImagePipeline:
    """Z-Image in small, without what encodes words: samples and words are lists, the prompt's first."""
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(16),
        text_encoder=None,
        tokenizer=None,
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[64, 32, 32],
        ),
    )


@seeded
def lumina() -> LuminaPipeline:
    """Lumina in small: the conditional half of a guided batch first, words from a layer before the last."""
    letters = gemma_tokenizer()
    return LuminaPipeline(
        transformer=LuminaNextDiT2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(4),
        text_encoder=gemma(letters),
        tokenizer=letters,
    )


@seeded
def lumina2() -> Lumina2Pipeline:
    """Lumina 2 in small: guidance by two calls without labels, its prediction negated for the scheduler."""
    letters = gemma_tokenizer()
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(128, 16, 16),
            cap_feat_dim=WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(4, shift_factor=0.06),
        text_encoder=gemma(letters),
        tokenizer=letters,
    )
