"""Tiny pipelines with random weights, made in memory: every family the tracer must take, nothing downloaded.

Each builder returns a live pipeline whose weights are the same every time; `CASES` has, for each, the
arguments of a run well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import CogVideoXDPMScheduler

from tests.tiny.blocks import modular_sdxl
from tests.tiny.cascades import kandinsky, stable_cascade
from tests.tiny.images import (
    auraflow,
    dit,
    flux,
    flux_from_image,
    lumina2,
    pixart,
    qwen,
    sana,
    sd3,
)
from tests.tiny.parts import BETAS, WIDTH, Builder, clip_tokenizer, mask, picture, t5_tokenizer
from tests.tiny.sounds import stable_audio
from tests.tiny.unets import (
    animatediff,
    controlnet,
    ddim,
    ddpm,
    pix2pix,
    sd1,
    sd1_from_image,
    sd1_inpaint,
    sd1_pag,
    sdxl,
)
from tests.tiny.videos import cogvideox, hunyuan_video, ltx, wan, wan22

__all__ = [
    "BETAS",
    "CASES",
    "FAMILIES",
    "SQUARE",
    "WIDTH",
    "WORDED",
    "Case",
    "clip_tokenizer",
    "ddpm",
    "dit",
    "flux",
    "mask",
    "picture",
    "pix2pix",
    "sd1",
    "sd1_from_image",
    "sd1_inpaint",
    "sd1_pag",
    "sd3",
    "sdxl",
    "stable_cascade",
    "t5_tokenizer",
    "wan22",
]


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
LARGE = {"height": 32, "width": 32}
WORDED = {"prompt": "a red circle", "num_inference_steps": 4}
UNBINNED = {"use_resolution_binning": False, "clean_caption": False}
SHORT = {"max_sequence_length": 24}
FILM = {"num_frames": 5, "output_type": "np"}

CASES: dict[str, Case] = {
    "sd1": Case(sd1, WORDED, "unet.mid_block"),
    "sdxl": Case(sdxl, WORDED, "unet.mid_block"),
    "sd3": Case(sd3, {**WORDED, **SHORT}, "transformer.transformer_blocks.0.ff"),
    "flux": Case(flux, {**WORDED, **SQUARE, **SHORT}, "transformer.transformer_blocks.0.ff"),
    "flux-cfg": Case(
        flux,
        {**WORDED, **SQUARE, **SHORT, "true_cfg_scale": 3.0, "negative_prompt": "a blue square"},
        "transformer.transformer_blocks.0.ff",
    ),
    "pixart": Case(pixart, {**WORDED, **SQUARE, **UNBINNED, **SHORT}, "transformer.transformer_blocks.0"),
    "wan": Case(wan, {**WORDED, **SQUARE, **FILM, **SHORT}, "transformer.blocks.0"),
    "wan22": Case(wan22, {**WORDED, **SQUARE, **FILM, **SHORT}, "transformer_2.blocks.0"),
    "ddpm": Case(ddpm, {"num_inference_steps": 4}, "unet.mid_block"),
    "dit": Case(dit, {"class_labels": [3], "num_inference_steps": 4}, "transformer.transformer_blocks.0"),
}
"""The families that nearly every part of the workbench is tested on."""

FAMILIES: dict[str, Case] = {
    **CASES,
    "ddim": Case(ddim, {"num_inference_steps": 4, "eta": 0.5}, "unet.mid_block"),
    "sd1-img2img": Case(sd1_from_image, {**WORDED, "image": picture(), "strength": 0.75}, "unet.mid_block"),
    "sd1-inpaint": Case(sd1_inpaint, {**WORDED, "image": picture(), "mask_image": mask()}, "unet.mid_block"),
    "sd1-pag": Case(sd1_pag, WORDED, "unet.mid_block"),
    "pix2pix": Case(pix2pix, {**WORDED, "image": picture()}, "unet.mid_block"),
    "controlnet": Case(controlnet, {**WORDED, "image": picture()}, "unet.mid_block"),
    "flux-img2img": Case(
        flux_from_image,
        {**WORDED, **SQUARE, **SHORT, "image": picture(), "strength": 0.75},
        "transformer.transformer_blocks.0.ff",
    ),
    "sana": Case(
        sana,
        {**WORDED, **LARGE, **SHORT, "use_resolution_binning": False, "complex_human_instruction": None},
        "transformer.transformer_blocks.0",
    ),
    "auraflow": Case(auraflow, {**WORDED, **SQUARE, **SHORT}, "transformer.single_transformer_blocks.0"),
    "qwen-image": Case(
        qwen,
        {**WORDED, **SQUARE, "negative_prompt": "a blue square"},
        "transformer.transformer_blocks.0.img_mlp",
    ),
    "lumina2": Case(
        lumina2,
        {**WORDED, **SQUARE, "system_prompt": "Draw.", "max_sequence_length": 48, "cfg_normalization": False},
        "transformer.noise_refiner.0",
    ),
    "ltx": Case(ltx, {**WORDED, **LARGE, **FILM, **SHORT}, "transformer.transformer_blocks.0"),
    "cogvideox": Case(
        cogvideox, {**WORDED, **SQUARE, **FILM, **SHORT}, "transformer.transformer_blocks.0.ff"
    ),
    "cogvideox-dpm": Case(
        lambda: cogvideox(CogVideoXDPMScheduler),
        {**WORDED, **SQUARE, **FILM, **SHORT},
        "transformer.transformer_blocks.0.ff",
    ),
    "hunyuan-video": Case(
        hunyuan_video,
        {**WORDED, **SQUARE, **FILM, **SHORT, "prompt_template": {"template": "{}", "crop_start": 0}},
        "transformer.transformer_blocks.0.ff",
    ),
    "animatediff": Case(animatediff, {**WORDED, "num_frames": 2, "output_type": "np"}, "unet.mid_block"),
    "stable-cascade": Case(
        stable_cascade,
        {**WORDED, "num_inference_steps": 2, "prior_num_inference_steps": 3, "height": 64, "width": 64},
        "decoder.down_blocks.0.0",
    ),
    "kandinsky": Case(
        kandinsky,
        {**WORDED, **SQUARE, "num_inference_steps": 2, "prior_num_inference_steps": 3},
        "unet.mid_block",
    ),
    "stable-audio": Case(stable_audio, WORDED, "transformer.transformer_blocks.0"),
    "modular-sdxl": Case(
        modular_sdxl, {**WORDED, **SQUARE, "output": ["images", "latents"]}, "unet.mid_block"
    ),
}
"""Every family: those above, and more that the tracer's own tests run on."""
