"""What tiny pipelines are made of: tokenizers, text encoders, autoencoders, pictures."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
    T5Tokenizer,
)

from workbench.zoo.language import WORDS
from workbench.zoo.tokens import build_tokenizer

WIDTH = 16
"""Width of every text encoder."""

LETTERS = 64
"""How many characters the tokenizers read that spell every word."""

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

Builder = Callable[..., Any]


def seeded(build: Builder) -> Builder:
    """Draw the weights from a fixed seed, and leave the global generator as it was."""

    @wraps(build)
    def built(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = build(*args, **kwargs)
            for part in pipeline.components.values():
                if isinstance(part, torch.nn.Module):
                    _wake(part.eval())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return built


def _wake(part: torch.nn.Module) -> None:
    """Give weights that training would start at zero a value: a layer that is silent tests nothing."""
    for weight in part.parameters():
        if weight.ndim > 1 and not weight.any():
            torch.nn.init.normal_(weight, std=0.05)


def picture(size: int = 16) -> Image.Image:
    """A square picture with a ramp of colour, ``size`` pixels wide."""
    ramp = np.linspace(0, 255, size * size * 3).reshape(3, size, size).transpose(1, 2, 0)
    return Image.fromarray(ramp.astype(np.uint8))


def mask(size: int = 16) -> Image.Image:
    """A mask of the right half of a square picture."""
    half = np.zeros((size, size), np.uint8)
    half[:, size // 2 :] = 255
    return Image.fromarray(half)


def clip_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows the words of the shapes world; 24 tokens a prompt."""
    return build_tokenizer()


def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer that knows the words of the shapes world, and spells all others."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -3.0) for word in WORDS]
    pieces += [(chr(code), -8.0) for code in range(ord("!"), ord("~") + 1)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=24)


def gemma_tokenizer() -> GemmaTokenizer:
    """A Gemma tokenizer that spells every word."""
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return GemmaTokenizer(vocab=_characters(names), model_max_length=LETTERS)


def llama_tokenizer() -> LlamaTokenizer:
    """A Llama tokenizer that spells every word."""
    vocab = _characters(["<unk>", "<s>", "</s>", "<pad>"])
    return LlamaTokenizer(vocab=vocab, pad_token="<pad>", padding_side="right", model_max_length=LETTERS)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer that reads bytes."""
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], model_max_length=1024)


def _characters(names: list[str]) -> dict[str, int]:
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    return {token: index for index, token in enumerate([*names, "▁", *letters])}


def gemma(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """A Gemma 2 as a text encoder."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=8,
            max_position_embeddings=256,
            attn_implementation="eager",
        )
    )


def vae(channels: int, **config: Any) -> AutoencoderKL:
    """An autoencoder that halves the size."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **config,
    )


def unet_config() -> dict[str, Any]:
    """A UNet with cross-attention in the middle and on one side."""
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


def clip_config(tokenizer: CLIPTokenizer, *, length: int | None = None) -> CLIPTextConfig:
    """A CLIP text encoder for a tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length or tokenizer.model_max_length,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_config(kind: type[Any], tokenizer: T5Tokenizer, *, width: int = WIDTH) -> Any:
    """A T5 text encoder for a tokenizer."""
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
