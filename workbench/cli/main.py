"""The commands. torch is loaded by those that need it, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import workbench as wb
from workbench.errors import WorkbenchError

app = typer.Typer(
    help="See inside diffusion models, and change what happens there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Folder = Annotated[
    Path, typer.Argument(metavar="FOLDER", help="A folder that a record or a stream was saved in.")
]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A zoo name (shapes-unet), a folder or a Hub id.")
]
Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What the image is to show.")]
Out = Annotated[
    Path, typer.Option("--out", metavar="FOLDER", help="Where to save; a record that is there is replaced.")
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--capture", metavar="SITE", help="A site to keep, such as unet.mid_block; may be repeated."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Noise seed.")]
StepCount = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps; the pipeline's own unless given.")
]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Guidance scale; the pipeline's own unless given.")
]


@app.command()
def record(
    model: Model,
    prompt: Prompt,
    out: Out,
    capture: Sites = None,
    seed: Seed = 0,
    steps: StepCount = None,
    guidance: Guidance = None,
) -> None:
    """Run a model once and save the run: its images, latents and what was captured.

    Example: workbench record shapes-unet "a red circle" --out run --capture unet.mid_block --steps 20
    """
    given: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    arguments = {name: value for name, value in given.items() if value is not None}
    run = wb.DiffusionModel(model).record(prompt, seed=seed, capture=capture or [], **arguments)
    typer.echo(f"{run.save(out)}: {run.ledger.steps} steps, {len(run.ledger)} calls")


@app.command()
def info(folder: Folder) -> None:
    """Say what a saved record, or a data set of activations, holds; no tensor is read."""
    from workbench.cli.table import table

    typer.echo(table(folder))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error of ours is one line, and exit status 2."""
    try:
        app(arguments, prog_name="workbench")
    except WorkbenchError as error:
        typer.echo(f"workbench: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
