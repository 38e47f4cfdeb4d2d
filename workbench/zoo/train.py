"""Train the shipped models from nothing.

``python -m workbench.zoo.train shapes-unet --out DIR`` trains first the autoencoder, then the denoiser with
its text encoder. Everything in between is kept under ``DIR``, so that a run that was stopped goes on from its
last checkpoint, and after every checkpoint ``DIR/export`` holds a complete pipeline of the averaged weights.
``--start FOLDER`` begins with the weights of an exported pipeline, and keeps its autoencoder.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from workbench.errors import InputError, nearest
from workbench.zoo.autoencoder import load_or_train
from workbench.zoo.denoiser import (
    Average,
    assemble,
    build_scheduler,
    build_text_encoder,
    build_unet,
    denoising_loss,
    draw_batch,
    encode_pool,
)
from workbench.zoo.tokens import build_tokenizer

log = logging.getLogger(__name__)

RECIPES = ("shapes-unet",)


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training run.

    Attributes:
        vae_steps: optimiser steps of the autoencoder, of 32 images each.
        images: how many images are drawn for it.
        steps: optimiser steps of the denoiser.
        batch: scenes a step of the denoiser.
        rate: highest learning rate of its one-cycle schedule.
        scenes: how many scenes are drawn and encoded for it.
        pairs: share of the scenes that are drawn with two objects; the others as ``sample`` does.
        seed: of everything.
        keep_every: steps between checkpoints.
    """

    vae_steps: int = 1600
    images: int = 20_000
    steps: int = 4200
    batch: int = 48
    rate: float = 1e-3
    scenes: int = 60_000
    pairs: float = 0.0
    seed: int = 0
    keep_every: int = 250


class Denoiser:
    """The denoiser in training: models, running averages, optimiser and schedule.

    Args:
        recipe: the numbers.
        start: whose weights and tokenizer to begin with; None is random weights.

    Attributes:
        step: how many steps have been made.
    """

    def __init__(self, recipe: Recipe, start: StableDiffusionPipeline | None = None) -> None:
        torch.manual_seed(recipe.seed)
        self.tokenizer = build_tokenizer() if start is None else start.tokenizer
        self.models = {"text_encoder": build_text_encoder(self.tokenizer), "unet": build_unet()}
        for name, model in self.models.items():
            if start is not None:
                model.load_state_dict(getattr(start, name).state_dict())
            model.train()
        self.models["unet"].to(memory_format=torch.channels_last)  # a tenth faster on a processor
        self.averages = {name: Average(model) for name, model in self.models.items()}
        parameters = [weight for model in self.models.values() for weight in model.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, recipe.rate, total_steps=recipe.steps, pct_start=0.06
        )
        self.noise = build_scheduler()
        self.step = 0

    def state(self) -> dict[str, Any]:
        """Everything a later run needs to go on from here."""
        return {
            "step": self.step,
            "models": {name: model.state_dict() for name, model in self.models.items()},
            "averages": {name: average.weights for name, average in self.averages.items()},
            "optimiser": self.optimiser.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to a state that ``state`` returned."""
        self.step = state["step"]
        for name, model in self.models.items():
            model.load_state_dict(state["models"][name])
            self.averages[name].weights = state["averages"][name]
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])

    def advance(self, batch: Any) -> float:
        """Make one optimiser step; returns the loss."""
        loss = denoising_loss(self.models["text_encoder"], self.models["unet"], self.noise, batch)
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for model in self.models.values():
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        for name, model in self.models.items():
            self.averages[name].update(model, self.step)
        self.step += 1
        return float(loss.detach())

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        """The averaged weights as a pipeline."""
        text_encoder, unet = build_text_encoder(self.tokenizer), build_unet()
        text_encoder.load_state_dict(self.averages["text_encoder"].weights)
        unet.load_state_dict(self.averages["unet"].weights)
        return assemble(vae, text_encoder.eval(), unet.eval(), self.tokenizer)


def train_shapes_unet(out: Path, recipe: Recipe, start: Path | None = None) -> Path:
    """Train ``shapes-unet``, or go on training it.

    Args:
        out: folder for what is kept on the way.
        recipe: how long, with which seed; it should be that of the run being continued.
        start: folder of a pipeline to begin with; None is from nothing.

    Returns:
        The folder of the exported pipeline.
    """
    if start is None:
        first, vae = None, load_or_train(out / "vae", recipe.vae_steps, recipe.seed, recipe.images)
    else:
        first = StableDiffusionPipeline.from_pretrained(start)
        vae = first.vae
    denoiser = Denoiser(recipe, first)
    kept = out / "denoiser.pt"
    if kept.exists():
        denoiser.load(torch.load(kept, weights_only=True))
        log.info("going on from step %d", denoiser.step)
    export(denoiser.pipeline(vae), out / "export")
    pool = encode_pool(vae, recipe.scenes, recipe.seed + 2, pairs=recipe.pairs)
    log.info("%d scenes encoded, latents' deviation %.3f", len(pool.scenes), float(pool.latents.std()))
    started, begun, recent = time.monotonic(), denoiser.step, 1.0
    while denoiser.step < recipe.steps:
        batch = draw_batch(pool, denoiser.tokenizer, recipe.batch, recipe.seed, denoiser.step)
        recent += 0.02 * (denoiser.advance(batch) - recent)
        if denoiser.step % 50 == 0:
            pace = (time.monotonic() - started) / (denoiser.step - begun)
            log.info("unet %5d/%d  loss %.4f  %.2f s a step", denoiser.step, recipe.steps, recent, pace)
        if denoiser.step % recipe.keep_every == 0 or denoiser.step == recipe.steps:
            _keep(denoiser, vae, kept)
    return out / "export"


def _keep(denoiser: Denoiser, vae: AutoencoderKL, kept: Path) -> None:
    """Write the checkpoint aside and move it in place, so that a stop in between loses nothing."""
    aside = kept.with_suffix(".part")
    torch.save(denoiser.state(), aside)
    aside.replace(kept)
    export(denoiser.pipeline(vae), kept.parent / "export")


def export(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Save a pipeline as float16 safetensors that load as float32 when no type is asked for.

    Args:
        pipeline: what to save; it is left as it is.
        folder: where to.
    """
    for name in ("unet", "vae", "text_encoder"):
        module = getattr(pipeline, name)
        full = {key: value.detach().clone() for key, value in module.state_dict().items()}
        module.half().save_pretrained(folder / name)
        module.float().load_state_dict(full)
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    pipeline.save_config(folder)
    # transformers loads the type named in the config, diffusers float32: name float32, or they differ.
    config = folder / "text_encoder" / "config.json"
    settings = json.loads(config.read_text()) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.zoo.train", description=__doc__)
    parser.add_argument("model", help=", ".join(RECIPES))
    parser.add_argument(
        "--out", type=Path, default=Path("training"), help="folder for checkpoints and the result"
    )
    parser.add_argument("--start", type=Path, default=None, help="folder of a pipeline to begin with")
    for number in fields(Recipe):
        parser.add_argument(
            f"--{number.name.replace('_', '-')}", type=type(number.default), default=number.default
        )
    given = parser.parse_args(arguments)
    if given.model not in RECIPES:
        raise InputError(f"There is no recipe for {given.model!r}.{nearest(given.model, RECIPES)}")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    recipe = Recipe(**{number.name: getattr(given, number.name) for number in fields(Recipe)})
    log.info("exported to %s", train_shapes_unet(given.out, recipe, given.start))


if __name__ == "__main__":
    main()
