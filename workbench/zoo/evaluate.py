"""Say how well a model of the zoo follows the words of its prompts.

``python -m workbench.zoo.evaluate shapes-unet`` draws prompts as the training did, makes an image of each
from its own noise, reads it back and prints what is right, beside the compositions that were kept out of
training and the reader's own work on drawn images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from workbench.zoo import models, path, settings
from workbench.zoo.language import parse
from workbench.zoo.reader import read
from workbench.zoo.scoring import ROWS, Score, rate, score
from workbench.zoo.shapes import Scene, Wording, render, sample, sample_wording
from workbench.zoo.tokens import LENGTH

BARS = {"colours": 0.98, "shapes": 0.95, "bound": 0.95, "all_but_places": 0.90}
"""What a model should reach."""

PLACES_BAR = {"places": 0.90}
"""What a model should reach too whose denoiser knows where things stand: a transformer, but not a UNet."""

LABELS = {
    "count": "number of objects",
    "colours": "colours right",
    "shapes": "shapes right",
    "bound": "colour bound to the right shape",
    "sizes": "sizes right",
    "ground": "ground right",
    "places": "places right",
    "all_but_places": "all words but places",
    "all_right": "all right",
}


@dataclass(frozen=True)
class Case:
    """A prompt, and a scene that it describes."""

    scene: Scene
    prompt: str


def draw_cases(count: int, seed: int, *, held_out: bool = False) -> list[Case]:
    """Draw prompts as the training did, from scenes that it saw the like of or from those kept out of it."""
    rng = np.random.default_rng(seed)
    scenes = [sample(rng, held_out=held_out) for _ in range(count)]
    return [Case(scene, scene.prompt(sample_wording(rng))) for scene in scenes]


def score_images(cases: Sequence[Case], images: Sequence[Any]) -> list[Score]:
    """Read one image a case and score it."""
    return [score(parse(case.prompt), read(image)) for case, image in zip(cases, images, strict=True)]


def generate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 3.0,
    first_seed: int = 0,
    batch: int = 40,
) -> list[Any]:
    """Make one image a prompt, each from its own seed, counted from ``first_seed``."""
    arguments: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    if isinstance(pipeline, StableDiffusion3Pipeline):
        arguments["max_sequence_length"] = LENGTH  # not its 256, nearly all of them empty
    images: list[Any] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        seeds = range(first_seed + start, first_seed + start + len(part))
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images += pipeline(part, generator=generators, **arguments).images
    return images


def table(columns: Mapping[str, Sequence[Score]], bars: Mapping[str, float] = BARS) -> str:
    """Lay scores out, a column for each set of images, with the bars and all-right last."""
    lines = [f"{'':34}" + "".join(f"{name:>20}" for name in columns) + f"{'bar':>8}"]
    for row in ROWS:
        cells = [_cell([getattr(one, row) for one in scores]) for scores in columns.values()]
        bar = f"{bars[row]:>8.0%}" if row in bars else f"{'':>8}"
        lines.append(f"{LABELS[row]:34}" + "".join(f"{cell:>20}" for cell in cells) + bar)
    return "\n".join(lines)


def _cell(values: Sequence[bool | None]) -> str:
    share, count = rate(values)
    return f"{share:.1%} of {count}" if count else "-"


def evaluate(
    pipeline: DiffusionPipeline,
    prompts: int = 400,
    *,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 1_000,
    report: Callable[[str], None] = print,
) -> dict[str, list[Score]]:
    """Score a pipeline on prompts like the training ones and on held-out compositions.

    Args:
        pipeline: what makes the images.
        prompts: how many of the first kind; a quarter as many of the second.
        steps: inference steps.
        guidance: guidance scale.
        seed: of prompts and noise; no training run draws from it.
        report: gets the table.

    Returns:
        The scores by column: ``model``, ``held out`` and ``reader``.
    """
    known = draw_cases(prompts, seed)
    held_out = draw_cases(max(prompts // 4, 1), seed + 1, held_out=True)

    def make(cases: Sequence[Case], first_seed: int) -> list[Score]:
        prompts_of = [case.prompt for case in cases]
        images = generate(pipeline, prompts_of, steps=steps, guidance=guidance, first_seed=first_seed)
        return score_images(cases, images)

    columns = {
        "model": make(known, 0),
        "held out": make(held_out, prompts),
        "reader": [
            score(parse(case.scene.prompt(Wording(places="each"))), read(render(case.scene)))
            for case in known
        ],
    }
    report(table(columns, BARS | PLACES_BAR if hasattr(pipeline, "transformer") else BARS))
    return columns


def main(arguments: list[str] | None = None) -> None:
    """Evaluate the model named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.zoo.evaluate", description=__doc__)
    parser.add_argument("model", help="a name of the zoo, or a folder")
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--steps", type=int, help="the model's own if not given; 20 of a folder")
    parser.add_argument("--guidance", type=float, help="the model's own if not given; 3 of a folder")
    given = parser.parse_args(arguments)
    folder = Path(given.model) if Path(given.model).is_dir() else path(given.model)
    own = settings(given.model) if given.model in models() else {}
    steps = own.get("num_inference_steps", 20) if given.steps is None else given.steps
    guidance = own.get("guidance_scale", 3.0) if given.guidance is None else given.guidance
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    evaluate(pipeline, given.prompts, steps=int(steps), guidance=guidance)


if __name__ == "__main__":
    main()
