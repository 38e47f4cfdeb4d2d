"""The commands. torch is loaded by those that need it, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import workbench as wb
from workbench.cli.failing import FailedError
from workbench.errors import WorkbenchError
from workbench.experiments.windows import WINDOWS

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
    Path,
    typer.Option("--out", metavar="FOLDER", help="Folder to write to; what it has of the same is replaced."),
]
Sites = Annotated[
    list[str] | None,
    typer.Option(
        "--capture", metavar="SITE", help="A site to keep, such as unet.mid_block; may be repeated."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Noise seed.")]
StepCount = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps; the model's own unless given.")
]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Guidance scale; the model's own unless given.")
]


ExperimentFile = Annotated[
    Path,
    typer.Argument(metavar="EXPERIMENT", help="A JSON file, or a script or notebook it was exported to."),
]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Import the modules it names, which may run anything.")
]
Records = Annotated[bool, typer.Option("--records", help="Save the runs too, beside the pictures.")]


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
    own = wb.zoo.settings(model) if model in wb.zoo.models() else {}
    arguments = {**own, **{name: value for name, value in given.items() if value is not None}}
    run = wb.DiffusionModel(model).record(prompt, seed=seed, capture=capture or [], **arguments)
    typer.echo(f"{run.save(out)}: {run.ledger.steps} steps, {len(run.ledger)} calls")


@app.command()
def demo(out: Out = Path("workbench-demo")) -> None:
    """Patch one run's colour into another through one layer of a shipped model; a few seconds.

    Example: workbench demo --out demo
    """
    from workbench.cli.experiments import demonstrate

    for line in demonstrate(out):
        typer.echo(line)


@app.command()
def models(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Show the components of this one.")
    ] = None,
) -> None:
    """List the models that are shipped, or the components of one, without its weights.

    Example: workbench models shapes-unet
    """
    from workbench.cli.experiments import components, shipped

    for line in shipped() if model is None else components(model):
        typer.echo(line)


@app.command()
def run(
    experiment: ExperimentFile, out: Out, allow_code: AllowCode = False, records: Records = False
) -> None:
    """Run an experiment and save its pictures: source, target, patched and branches.

    Example: workbench run experiment.json --out results
    """
    from workbench.cli.experiments import perform

    for line in perform(wb.Experiment.load(experiment), out, allow_code=allow_code, records=records):
        typer.echo(line)


@app.command()
def sweep(
    experiment: ExperimentFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder for the map; a sweep begun there goes on."),
    ] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            metavar="SITE",
            help="A site to patch; may be repeated. All blocks and attentions if not given.",
        ),
    ] = None,
    step: Annotated[
        list[int] | None, typer.Option("--step", help="A step; may be repeated. All if not given.")
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(
            "--words",
            help="A word of both prompts, or 'red -> blue', the source's red where the target has blue; "
            "several at once are joined by +; may be repeated. For --site of layers that text passes.",
        ),
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            "--heads",
            help="A head, or several at once (0+1), of sites such as …attn2:heads; may be repeated.",
        ),
    ] = None,
    branch: Annotated[
        list[str] | None,
        typer.Option("--branch", help="A guidance branch, cond if none is given; may be repeated."),
    ] = None,
    window: Annotated[
        str, typer.Option("--window", help=f"Which steps a cell covers: {', '.join(WINDOWS)}.")
    ] = "1",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="How many noise seeds, from the experiment's own.")
    ] = 4,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="What is measured, such as towards (if none is given), difference, ssim, colour:red, "
            "ssim:to=source; may be repeated.",
        ),
    ] = None,
    script: Annotated[
        Path | None,
        typer.Option(
            "--script", metavar="FILE", help="Write the sweep as a .py or .ipynb file; runs it if --out says."
        ),
    ] = None,
    standalone: Annotated[
        bool,
        typer.Option(
            "--standalone/--workbench", help="The script: on diffusers and torch alone, or on this package."
        ),
    ] = True,
    retry: Annotated[bool, typer.Option("--retry", help="Run cells that failed before again.")] = False,
) -> None:
    """Patch every site at every step, each beside a random direction, and write the map.

    Source and target are the experiment's; what it changes itself is left out. Killed, a sweep goes on
    where it was. Cells that failed are counted; where all did, the exit status is 1.

    Example: workbench sweep experiment.json --out map --site unet.mid_block --seeds 2
    """
    from workbench.cli.experiments import survey

    def tell(told: Any) -> None:
        typer.echo(f"{told.done} of {told.total} cells", err=True)

    opened = wb.Experiment.load(experiment)
    axes = {"site": site, "step": step, "branch": branch, "heads": heads, "words": words}
    asked = {"axes": axes, "window": window, "seeds": seeds, "metrics": metric}
    written = {"script": script, "standalone": standalone, "retry": retry}
    for line in survey(opened, out, progress=tell, **asked, **written):  # type: ignore[arg-type]
        typer.echo(line)


@app.command()
def export(
    experiment: ExperimentFile,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="What to write: a .py or .ipynb file.")],
    standalone: Annotated[
        bool,
        typer.Option("--standalone/--workbench", help="On diffusers and torch alone, or on this package."),
    ] = True,
    allow_code: AllowCode = False,
) -> None:
    """Write an experiment as a script or a notebook that makes the same image.

    Example: workbench export experiment.json --out experiment.py
    """
    from workbench.cli.experiments import written

    opened = wb.Experiment.load(experiment)
    typer.echo(written(opened, out, standalone=standalone, allow_code=allow_code))


@app.command()
def show(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path(
        "record.html"
    ),
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="What decodes its latents; its own if not given."),
    ] = None,
) -> None:
    """Write a saved record as a page that scrubs through its steps, without a kernel or a network.

    Example: workbench show run --out run.html
    """
    from workbench.cli.experiments import reopened

    typer.echo(str(wb.save_html(reopened(folder, model), out)))


@app.command()
def info(folder: Folder) -> None:
    """Say what a saved record, or a data set of activations, holds; no tensor is read."""
    from workbench.cli.table import table

    typer.echo(table(folder))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line, with exit status 2 of what was asked, 1 of a run."""
    try:
        app(arguments, prog_name="workbench")
    except WorkbenchError as error:
        typer.echo(f"workbench: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except FailedError as error:
        typer.echo(f"workbench: {' '.join(str(error).split())}", err=True)
        sys.exit(1)
    except OSError as error:
        typer.echo(f"workbench: {error}", err=True)
        sys.exit(2)
