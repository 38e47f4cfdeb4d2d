"""Folders of large models that hold their configurations and no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, T5Config

from tests.tiny.parts import clip_tokenizer, t5_tokenizer

PARAMETERS = {"sdxl": {"unet": 2_567_463_684}, "flux": {"transformer": 11_901_408_320}}
"""How many the denoisers have, as their authors' weights do."""

_CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def write(folder: Path, name: str) -> Path:
    """Write the configurations of ``sdxl`` or ``flux`` into a folder, and return it."""
    {"sdxl": _sdxl, "flux": _flux}[name](folder)
    return folder


def _sdxl(folder: Path) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    unet.save_config(folder / "unet")
    _autoencoder(folder, 4)
    EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    _text(folder, "text_encoder", CLIPTextConfig(vocab_size=49408, **_CLIP_L), clip_tokenizer())
    _text(folder, "text_encoder_2", CLIPTextConfig(vocab_size=49408, **_CLIP_G), clip_tokenizer())
    _index(
        folder,
        "StableDiffusionXLPipeline",
        unet=("diffusers", "UNet2DConditionModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "EulerDiscreteScheduler"),
        text_encoder=("transformers", "CLIPTextModel"),
        text_encoder_2=("transformers", "CLIPTextModelWithProjection"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "CLIPTokenizer"),
    )


def _flux(folder: Path) -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    transformer.save_config(folder / "transformer")
    _autoencoder(folder, 16)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    large = T5Config(
        d_model=4096,
        d_ff=10240,
        d_kv=64,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        vocab_size=32128,
    )
    _text(folder, "text_encoder", CLIPTextConfig(vocab_size=49408, **_CLIP_L), clip_tokenizer())
    _text(folder, "text_encoder_2", large, t5_tokenizer())
    _index(
        folder,
        "FluxPipeline",
        transformer=("diffusers", "FluxTransformer2DModel"),
        vae=("diffusers", "AutoencoderKL"),
        scheduler=("diffusers", "FlowMatchEulerDiscreteScheduler"),
        text_encoder=("transformers", "CLIPTextModel"),
        text_encoder_2=("transformers", "T5EncoderModel"),
        tokenizer=("transformers", "CLIPTokenizer"),
        tokenizer_2=("transformers", "T5TokenizerFast"),
    )


def _autoencoder(folder: Path, channels: int) -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=channels,
            sample_size=1024,
        )
    vae.save_config(folder / "vae")


def _text(folder: Path, name: str, config: Any, tokenizer: Any) -> None:
    config.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name.replace("text_encoder", "tokenizer"))


def _index(folder: Path, pipeline: str, **parts: tuple[str, str]) -> None:
    index = {"_class_name": pipeline, **{name: list(part) for name, part in parts.items()}}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
