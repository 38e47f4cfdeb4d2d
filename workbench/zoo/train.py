"""Train the shipped models from nothing.

``python -m workbench.zoo.train shapes-unet --out DIR`` trains first the autoencoder, then the denoiser with
its text encoder. Everything in between is kept under ``DIR``, so that a run that was stopped goes on from its
last checkpoint, and after every checkpoint ``DIR/export`` holds a complete pipeline of the averaged weights.
``--start FOLDER`` begins with the weights of an exported pipeline, and keeps its autoencoder.
``shapes-mmdit`` takes the autoencoder and tokenizer of the zoo's ``shapes-unet``, and begins with its text
encoder; ``shapes-planted`` begins with all of it.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from workbench.errors import InputError, nearest
from workbench.zoo import path
from workbench.zoo.autoencoder import load_or_train
from workbench.zoo.denoiser import (
    Pool,
    assemble,
    build_scheduler,
    build_text_encoder,
    build_unet,
    denoising_loss,
    draw_batch,
    draw_scenes,
    encode_pool,
)
from workbench.zoo.export import export
from workbench.zoo.mmdit import (
    assemble_mmdit,
    build_encoders,
    build_transformer,
    draw_times,
    flow_loss,
    silent_rows,
    teach,
)
from workbench.zoo.planted import plant, transplant
from workbench.zoo.tokens import build_tokenizer
from workbench.zoo.training import Recipe, Training
from workbench.zoo.unconditional import (
    assemble_unconditional,
    build_ddpm_scheduler,
    build_unconditional,
    draw_images,
    noise_loss,
)

log = logging.getLogger(__name__)

RECIPES = {
    "shapes-unet": Recipe(),
    "shapes-ddpm": Recipe(steps=8000, batch=8, rate=8e-4, scenes=20_000),
    "shapes-mmdit": Recipe(steps=4000, batch=64, scenes=40_000, pairs=0.5, twins=0.12),
    "shapes-planted": Recipe(steps=1000, batch=32, rate=4e-4, scenes=24_000, pairs=0.5, twins=0.12),
}
"""The numbers that a model is trained with, unless the command line says otherwise."""

_IDLE = {
    "shapes-ddpm": ("vae_steps", "images", "pairs", "twins"),
    "shapes-mmdit": ("vae_steps", "images"),
    "shapes-planted": ("vae_steps", "images"),
}
"""Numbers that mean nothing for a model: without words, or with an autoencoder that is there already."""

Hold = Callable[[CLIPTokenizer, CLIPTextModel, UNet2DConditionModel], None]
"""Changes some weights of a model."""


def train_shapes_unet(
    out: Path,
    recipe: Recipe,
    start: Path | None = None,
    *,
    prepare: Hold | None = None,
    hold: Hold | None = None,
) -> Path:
    """Train ``shapes-unet``, or go on training it.

    Args:
        out: folder for what is kept on the way.
        recipe: how long, with which seed; it should be that of the run being continued.
        start: folder of a pipeline to begin with; None is from nothing.
        prepare: changes the weights to begin with.
        hold: puts back weights that must stay as they are.

    Returns:
        The folder of the exported pipeline.
    """
    if start is None:
        first, vae = None, load_or_train(out / "vae", recipe.vae_steps, recipe.seed, recipe.images)
    else:
        first = StableDiffusionPipeline.from_pretrained(start)
        vae = first.vae
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer() if first is None else first.tokenizer
    text_encoder, unet, noise = build_text_encoder(tokenizer), build_unet(), build_scheduler()
    if first is not None:
        text_encoder.load_state_dict(first.text_encoder.state_dict())
        unet.load_state_dict(first.unet.state_dict())
    if prepare is not None:
        prepare(tokenizer, text_encoder, unet)
    unet.to(memory_format=torch.channels_last)  # a tenth faster on a processor
    held = None if hold is None else partial(hold, tokenizer, text_encoder, unet)
    training = Training({"text_encoder": text_encoder, "unet": unet}, recipe, held)
    training.resume(out / "denoiser.pt")

    def write() -> None:
        encoder = training.averaged("text_encoder", build_text_encoder(tokenizer))
        denoiser = training.averaged("unet", build_unet())
        if hold is not None:
            hold(tokenizer, encoder, denoiser)
        export(assemble(vae, encoder, denoiser, tokenizer), out / "export")

    write()
    pool = _pool(out, vae, recipe)
    log.info("%d scenes encoded, latents' deviation %.3f", len(pool.scenes), float(pool.latents.std()))

    def loss(step: int) -> Tensor:
        batch = draw_batch(pool, tokenizer, recipe.batch, recipe.seed, step)
        return denoising_loss(text_encoder, unet, noise, batch)

    training.run(loss, out / "denoiser.pt", write)
    return out / "export"


def _pool(out: Path, vae: AutoencoderKL, recipe: Recipe) -> Pool:
    """Return what is trained on, encoded once: a run that goes on reads it again."""
    drawn = {name: getattr(recipe, name) for name in ("scenes", "seed", "pairs", "twins")}
    kept = out / "pool.pt"
    found = torch.load(kept, weights_only=True) if kept.exists() else {}
    if found.get("drawn") == drawn:
        scenes = draw_scenes(recipe.scenes, recipe.seed + 2, recipe.pairs, recipe.twins)
        return Pool(scenes, found["latents"])
    pool = encode_pool(vae, recipe.scenes, recipe.seed + 2, pairs=recipe.pairs, twins=recipe.twins)
    torch.save({"drawn": drawn, "latents": pool.latents}, kept)
    return pool


def train_shapes_planted(out: Path, recipe: Recipe, start: Path | None = None) -> Path:
    """Train ``shapes-planted``, or go on training it; as `train_shapes_unet`, from the zoo's if not told."""
    if start is not None:
        return train_shapes_unet(out, recipe, start, hold=plant)
    return train_shapes_unet(out, recipe, path("shapes-unet"), prepare=transplant, hold=plant)


def train_shapes_mmdit(out: Path, recipe: Recipe, start: Path | None = None) -> Path:
    """Train ``shapes-mmdit``, or go on training it; as `train_shapes_unet`."""
    if start is None:
        given = StableDiffusionPipeline.from_pretrained(path("shapes-unet"))
    else:
        given = StableDiffusion3Pipeline.from_pretrained(start)
    vae, tokenizer = given.vae, given.tokenizer
    torch.manual_seed(recipe.seed)
    encoders, transformer = build_encoders(tokenizer), build_transformer()
    models = {"text_encoder": encoders[0], "text_encoder_2": encoders[1], "transformer": transformer}
    if start is None:
        teach(encoders[0], given.text_encoder)
    else:
        for name, model in models.items():
            model.load_state_dict(given.components[name].state_dict())
    training = Training(models, recipe)
    training.resume(out / "denoiser.pt")

    def write() -> None:
        names = ("text_encoder", "text_encoder_2")
        fresh = zip(names, build_encoders(tokenizer), strict=True)
        averaged = [training.averaged(name, encoder) for name, encoder in fresh]
        denoiser = training.averaged("transformer", build_transformer())
        export(assemble_mmdit(vae, averaged, denoiser, tokenizer), out / "export")

    write()
    pool = _pool(out, vae, recipe)

    def loss(step: int) -> Tensor:
        silent = silent_rows(step)
        size = max(recipe.batch // 4, 1) if silent else recipe.batch  # so many tokens take the same time
        batch = draw_batch(pool, tokenizer, size, recipe.seed, step, times=draw_times)
        return flow_loss(encoders, transformer, batch, silent)

    training.run(loss, out / "denoiser.pt", write)
    return out / "export"


def train_shapes_ddpm(out: Path, recipe: Recipe, start: Path | None = None) -> Path:
    """Train ``shapes-ddpm``, or go on training it; as `train_shapes_unet`."""
    torch.manual_seed(recipe.seed)
    unet, noise = build_unconditional(), build_ddpm_scheduler()
    if start is not None:
        unet.load_state_dict(DDPMPipeline.from_pretrained(start).unet.state_dict())
    unet.to(memory_format=torch.channels_last)
    training = Training({"unet": unet}, recipe)
    out.mkdir(parents=True, exist_ok=True)
    training.resume(out / "denoiser.pt")
    images = draw_images(recipe.scenes, recipe.seed + 2)

    def write() -> None:
        export(assemble_unconditional(training.averaged("unet", build_unconditional())), out / "export")

    def loss(step: int) -> Tensor:
        return noise_loss(unet, noise, images, recipe.batch, recipe.seed, step)

    write()
    training.run(loss, out / "denoiser.pt", write)
    return out / "export"


_TRAIN: dict[str, Callable[[Path, Recipe, Path | None], Path]] = {
    "shapes-unet": train_shapes_unet,
    "shapes-ddpm": train_shapes_ddpm,
    "shapes-mmdit": train_shapes_mmdit,
    "shapes-planted": train_shapes_planted,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.zoo.train", description=__doc__)
    parser.add_argument("model", help=", ".join(RECIPES))
    parser.add_argument(
        "--out", type=Path, help="folder for checkpoints and the result; training/MODEL if not given"
    )
    parser.add_argument("--start", type=Path, default=None, help="folder of a pipeline to begin with")
    for number in fields(Recipe):
        parser.add_argument(f"--{number.name.replace('_', '-')}", type=type(number.default), default=None)
    given = parser.parse_args(arguments)
    if given.model not in RECIPES:
        raise InputError(f"There is no recipe for {given.model!r}.{nearest(given.model, RECIPES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asked = {number.name: getattr(given, number.name) for number in fields(Recipe)}
    idle = [name for name in _IDLE.get(given.model, ()) if asked[name] is not None]
    if idle:
        raise InputError(f"In the recipe of {given.model} nothing takes {', '.join(idle)}: leave it out.")
    out = given.out or Path("training") / given.model
    recipe = replace(
        RECIPES[given.model], **{name: value for name, value in asked.items() if value is not None}
    )
    log.info("exported to %s", _TRAIN[given.model](out, recipe, given.start))


if __name__ == "__main__":
    main()
