"""A pipeline that makes sound."""

from __future__ import annotations

from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from transformers import T5Config, T5EncoderModel

from tests.tiny.parts import WIDTH, seeded, t5_config, t5_tokenizer


@seeded
def stable_audio() -> StableAudioPipeline:
    """Stable Audio in small: latents along time, preconditioned by their noise level."""
    words = t5_tokenizer()
    return StableAudioPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            channel_multiples=[2, 4],
            decoder_channels=3,
            decoder_input_channels=3,
            sampling_rate=4,
        ),
        text_encoder=T5EncoderModel(t5_config(T5Config, words)),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=4, min_value=0, max_value=32
        ),
        tokenizer=words,
        transformer=StableAudioDiTModel(
            sample_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            cross_attention_dim=4,
            cross_attention_input_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
        ),
        scheduler=EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )
