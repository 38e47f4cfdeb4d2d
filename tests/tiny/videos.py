"""Films by transformers."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny.parts import (
    WIDTH,
    clip_config,
    clip_tokenizer,
    llama_tokenizer,
    seeded,
    t5_config,
    t5_tokenizer,
)


@seeded
def wan(*, two: bool = False) -> WanPipeline:
    """Wan in small: video, guidance by two calls; with ``two``, a second transformer for the late steps."""
    words = t5_tokenizer()
    return WanPipeline(
        tokenizer=words,
        text_encoder=UMT5EncoderModel(t5_config(UMT5Config, words)),
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
def ltx() -> LTXPipeline:
    """LTX-Video in small: latents packed into tokens."""
    words = t5_tokenizer()
    sides = {
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
    }
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLLTXVideo(
            latent_channels=8,
            patch_size=1,
            **sides,
            **{f"decoder_{name}": value for name, value in sides.items()},
        ),
        text_encoder=T5EncoderModel(t5_config(T5Config, words)),
        tokenizer=words,
        transformer=LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=2,
            caption_channels=WIDTH,
        ),
    )


@seeded
def cogvideox(scheduler: type[Any] = CogVideoXDDIMScheduler) -> CogVideoXPipeline:
    """CogVideoX in small: text and video in one sequence, both guidance branches in one labelled call."""
    words = t5_tokenizer()
    return CogVideoXPipeline(
        tokenizer=words,
        text_encoder=T5EncoderModel(t5_config(T5Config, words)),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            sample_height=16,
            sample_width=16,
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=2,
            sample_width=2,
            sample_height=2,
            sample_frames=5,
            max_text_seq_length=24,
        ),
        scheduler=scheduler(),
    )


@seeded
def hunyuan_video() -> HunyuanVideoPipeline:
    """HunyuanVideo in small: a language model as its text encoder, guidance as a number it is told."""
    letters, tokenizer = llama_tokenizer(), clip_tokenizer()
    return HunyuanVideoPipeline(
        text_encoder=LlamaModel(
            LlamaConfig(
                vocab_size=len(letters),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=256,
                pad_token_id=letters.pad_token_id,
            )
        ),
        tokenizer=letters,
        transformer=HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(2, 4, 4),
        ),
        vae=AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder_2=CLIPTextModel(clip_config(tokenizer, length=77)),
        tokenizer_2=tokenizer,
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
