"""Pipelines of two stages: a prior makes what a decoder starts from, each with a scheduler of its own."""

from __future__ import annotations

import torch
from diffusers import (
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    KandinskyV22CombinedPipeline,
    PriorTransformer,
    StableCascadeCombinedPipeline,
    StableCascadeUNet,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.tiny.parts import WIDTH, clip_config, clip_tokenizer, seeded


@seeded
def stable_cascade() -> StableCascadeCombinedPipeline:
    """Stable Cascade in small: guidance batched as cond and uncond, times from one to zero."""
    tokenizer = clip_tokenizer()
    encoder = CLIPTextModelWithProjection(clip_config(tokenizer))
    two = {"down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1)}
    plain = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    return StableCascadeCombinedPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        decoder=StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            conditioning_dim=WIDTH,
            block_out_channels=(8, 16),
            num_attention_heads=(-1, 2),
            block_types_per_layer=(plain, (*plain, "SDCascadeAttnBlock")),
            clip_text_pooled_in_channels=WIDTH,
            effnet_in_channels=4,
            dropout=(0.0, 0.0),
            **two,
        ),
        scheduler=DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, embed_dim=8, num_vq_embeddings=2),
        prior_prior=StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            timestep_ratio_embedding_dim=8,
            conditioning_dim=WIDTH,
            block_out_channels=(16, 16),
            num_attention_heads=(2, 2),
            clip_text_in_channels=WIDTH,
            clip_text_pooled_in_channels=WIDTH,
            clip_image_in_channels=WIDTH,
            dropout=(0.0, 0.0),
            switch_level=(False,),
            **two,
        ),
        prior_text_encoder=encoder,
        prior_tokenizer=tokenizer,
        prior_scheduler=DDPMWuerstchenScheduler(),
    )


@seeded
def kandinsky() -> KandinskyV22CombinedPipeline:
    """Kandinsky 2.2 in small: a prior over image embeddings, then a UNet that also predicts a variance."""
    tokenizer = clip_tokenizer()
    prior = PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        embedding_dim=WIDTH,
        num_embeddings=tokenizer.model_max_length,
    )
    torch.nn.init.ones_(prior.clip_std)
    return KandinskyV22CombinedPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,
            addition_embed_type="image",
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            encoder_hid_dim=WIDTH,
            encoder_hid_dim_type="image_proj",
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=DDPMScheduler(),
        movq=VQModel(
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            block_out_channels=(32, 32),
            norm_type="spatial",
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=8,
        ),
        prior_prior=prior,
        prior_image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            )
        ),
        prior_text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)),
        prior_tokenizer=tokenizer,
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        prior_image_processor=CLIPImageProcessorPil(size=16, crop_size=16),
    )
