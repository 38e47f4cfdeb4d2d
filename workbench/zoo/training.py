"""A training run that can be stopped at any step and goes on from its last checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)


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
        twins: share of the scenes that show two objects of one kind, for the empty prompt alone.
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
    twins: float = 0.0
    seed: int = 0
    keep_every: int = 250


class Average:
    """The running average of a model's weights, which is what is shipped."""

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move towards the model's weights, faster in the first steps."""
        pull = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            kept = self.weights[name]
            if kept.is_floating_point():
                kept.lerp_(value, pull)
            else:
                kept.copy_(value)


class Training:
    """Models in training: their running averages, optimiser and schedule.

    Args:
        models: what is trained, by name.
        recipe: the numbers.
        hold: puts back weights that must stay as they are; called at the beginning and after every step.

    Attributes:
        step: how many steps have been made.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], recipe: Recipe, hold: Callable[[], None] | None = None
    ) -> None:
        self.recipe = recipe
        self.models = dict(models)
        self.hold = hold or (lambda: None)
        self.hold()
        self.averages = {name: Average(model.train()) for name, model in models.items()}
        parameters = [weight for model in models.values() for weight in model.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimiser, recipe.rate, total_steps=recipe.steps, pct_start=0.06
        )
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

    def advance(self, loss: Tensor) -> float:
        """Make one optimiser step; returns the loss."""
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        for model in self.models.values():
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.optimiser.step()
        self.hold()
        self.schedule.step()
        for name, model in self.models.items():
            self.averages[name].update(model, self.step)
        self.step += 1
        return float(loss.detach())

    def averaged(self, name: str, model: nn.Module) -> nn.Module:
        """Fill a model with the averaged weights of the one of this name."""
        model.load_state_dict(self.averages[name].weights)
        return model.eval()

    def run(self, loss: Callable[[int], Tensor], kept: Path, export: Callable[[], None]) -> None:
        """Train to the recipe's last step, from the checkpoint if there is one.

        Args:
            loss: makes the loss of a step; the same step must be the same batch, also after a restart.
            kept: the checkpoint, written aside and moved in place, so that a stop in between loses nothing.
            export: writes the averaged weights out, after every checkpoint.
        """
        started, begun, recent = time.monotonic(), self.step, 1.0
        while self.step < self.recipe.steps:
            recent += 0.02 * (self.advance(loss(self.step)) - recent)
            if self.step % 50 == 0:
                pace = (time.monotonic() - started) / (self.step - begun)
                log.info("%5d/%d  loss %.4f  %.2f s a step", self.step, self.recipe.steps, recent, pace)
            if self.step % self.recipe.keep_every == 0 or self.step == self.recipe.steps:
                aside = kept.with_suffix(".part")
                torch.save(self.state(), aside)
                aside.replace(kept)
                export()

    def resume(self, kept: Path) -> None:
        """Go on from a checkpoint, if it is there."""
        if kept.exists():
            self.load(torch.load(kept, weights_only=True))
            log.info("going on from step %d", self.step)
