"""The recipe of ``shapes-mmdit``: a joint transformer and flow matching, as Esser et al. (2024) have it.

Image and text are tokens of one attention, and each image token knows where it stands: the model can follow
words for places, which the UNet of ``shapes-unet`` cannot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from workbench.zoo.autoencoder import mixed_precision
from workbench.zoo.denoiser import WIDTH, Batch, text_config
from workbench.zoo.tokens import LENGTH

SHIFT = 3.0
"""How far times are moved towards noise, where places and colours are decided, in training and sampling."""

PERTURBATION = 0.1
"""How much noise of another scene is added to that of each, in deviations, in training."""

SILENT_ROWS = 256
"""The pipeline's ``max_sequence_length`` unless told otherwise: rows that a T5 encoder adds to the text."""


def build_encoders(tokenizer: CLIPTokenizer) -> list[CLIPTextModelWithProjection]:
    """Make the two text encoders, untrained; their outputs lie side by side, (batch, 24, 2 * 96).

    Of four layers, for what the transformer attends to is read before the last.
    """
    return [CLIPTextModelWithProjection(text_config(tokenizer, layers=4)) for _ in range(2)]


def teach(encoder: CLIPTextModelWithProjection, taught: CLIPTextModel) -> None:
    """Begin with a text encoder of three layers that is trained: it binds colours to things already."""
    weights = {
        f"text_model.{name.removeprefix('text_model.')}": value for name, value in taught.state_dict().items()
    }
    left = encoder.load_state_dict(weights, strict=False)
    own = ("text_projection.", "text_model.encoder.layers.3.")
    if left.unexpected_keys or not all(name.startswith(own) for name in left.missing_keys):
        raise ValueError(f"The text encoder does not fit: {left}.")


def build_transformer() -> SD3Transformer2DModel:
    """Make the denoiser, untrained: 7.8 M parameters, latents of (batch, 4, 16, 16) as 64 tokens."""
    heads, width = 4, 48
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        num_attention_heads=heads,
        attention_head_dim=width,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        caption_projection_dim=heads * width,
        pos_embed_max_size=8,
    )


def build_silent_encoder() -> tuple[T5EncoderModel, T5Tokenizer]:
    """Make a T5 encoder that says nothing, and its tokenizer.

    It knows no word and has no layers, and zeros come out: what the pipeline itself puts where it has no T5.
    It is there because diffusers opens no folder of this pipeline without one, unless told
    ``text_encoder_3=None``.
    """
    pieces = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>")]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)
    encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=2 * WIDTH, num_layers=0))
    torch.nn.init.zeros_(encoder.shared.weight)
    return encoder.eval(), tokenizer


def assemble_mmdit(
    vae: AutoencoderKL,
    encoders: Sequence[CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
    tokenizer: CLIPTokenizer,
) -> StableDiffusion3Pipeline:
    """Put the parts into a pipeline; the autoencoder gets the shift of zero that this one asks for."""
    vae.register_to_config(shift_factor=0.0)
    silent, pieces = build_silent_encoder()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=silent,
        tokenizer_3=pieces,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_times(size: int, generator: torch.Generator) -> Tensor:
    """Draw timesteps, (size,) from 0 to 1000: logit-normal, then shifted as the scheduler shifts its own."""
    times = torch.randn(size, generator=generator).sigmoid()
    return 1000 * SHIFT * times / (1 + (SHIFT - 1) * times)


def read_text(
    encoders: Sequence[CLIPTextModelWithProjection], ids: Tensor, silent: int = 0
) -> tuple[Tensor, Tensor]:
    """Read prompts as the pipeline does.

    Args:
        encoders: the two.
        ids: of the prompts' tokens, (batch, 24).
        silent: rows of zeros after them.

    Returns:
        What the transformer attends to, (batch, 24 + silent, 192), and what goes into its time embedding,
        (batch, 192).
    """
    read = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    rows = torch.cat([each.hidden_states[-2] for each in read], dim=-1)
    pooled = torch.cat([each.text_embeds for each in read], dim=-1)
    return functional.pad(rows, (0, 0, 0, silent)), pooled


def silent_rows(step: int) -> int:
    """How many rows of zeros a step trains with: none, but the pipeline's own number in every eighth.

    The transformer has to learn to leave them alone, and needs them no more often for that.
    """
    return SILENT_ROWS if step % 8 == 7 else 0


def flow_loss(
    encoders: Sequence[CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
    batch: Batch,
    silent: int,
) -> Tensor:
    """Mean squared error of the predicted flow from image to noise, evened out over the times.

    As with `denoiser.denoising_loss`, the error is divided by about what it comes to at each time. The noise
    that the transformer sees has a little of another scene's in it, which it is not to predict: from its own
    earlier steps it gets latents that are off by as much, and else goes on with a square that has become a
    rectangle (input perturbation, Ning et al., 2023).

    Args:
        encoders: of the text.
        transformer: the denoiser.
        batch: what to train on.
        silent: rows of zeros after the text.
    """
    times = batch.timesteps / 1000
    share = times.view(-1, 1, 1, 1)
    seen = batch.noise + PERTURBATION * batch.noise.roll(1, 0)
    noisy = (1 - share) * batch.latents + share * seen
    with mixed_precision():
        rows, pooled = read_text(encoders, batch.ids, silent)
        predicted = transformer(noisy, rows, pooled, batch.timesteps).sample
    error = (predicted.float() - (batch.noise - batch.latents)).square().mean((1, 2, 3))
    loss: Tensor = (error / (0.07 + 0.6 * times**5)).mean()
    return loss
