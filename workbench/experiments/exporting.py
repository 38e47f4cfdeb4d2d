"""Experiments as files of each kind that they are exported to; `Experiment.load` reads them again."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import InputError
from workbench.experiments.experiment import Experiment
from workbench.experiments.scripts import carrying, notebook, workbench_code
from workbench.experiments.standalone import standalone_code
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record

FORMATS = {
    "standalone": "experiment-standalone.py",
    "workbench": "experiment-workbench.py",
    "notebook": "experiment.ipynb",
    "experiment": "experiment.json",
}
"""What an experiment is exported to (a script on diffusers and torch alone, one on the workbench, a notebook,
plain data), and what such a file is called."""


def exported(
    experiment: Experiment,
    format: str,
    model: DiffusionModel | None = None,
    *,
    runs: tuple[Record, Record] | None = None,
    allow_code: bool = False,
    suffix: str | None = None,
) -> str:
    """Return the text of a file.

    Args:
        experiment: what to write.
        format: one of `FORMATS`.
        model: the model it is of, if that is open.
        runs: its source and target, which a standalone script needs; None runs them.
        allow_code: whether a script may import what the experiment names as modules of one's own.
        suffix: the file's, ``.py`` or ``.ipynb``, if not the format's own.

    Raises:
        InputError: a standalone script cannot do what the experiment does.
    """
    if model is not None:
        experiment.check_weights(model)
        experiment = experiment.sampled(model)
    if format == "experiment":
        return experiment.model_dump_json(indent=2) + "\n"
    if format == "standalone":
        code = standalone_code(experiment, *(runs or _runs(experiment, model)), allow_code=allow_code)
    else:
        code = workbench_code(experiment, model, allow_code=allow_code)
    return as_file(code, suffix or Path(FORMATS[format]).suffix, experiment)


def as_file(code: str, suffix: str, experiment: Experiment | None = None) -> str:
    """Return code as the text of a script, ``.py``, or of a notebook, ``.ipynb``, with its experiment.

    Raises:
        InputError: the file is neither.
    """
    if suffix not in (".py", ".ipynb"):
        raise InputError(f"A file that ends in {suffix!r} is neither a script, .py, nor a notebook, .ipynb.")
    if suffix == ".py":
        return code if experiment is None else carrying(code, experiment)
    # A notebook's command line is its kernel's.
    return notebook(code.replace("parser.parse_args()", "parser.parse_args([])"), experiment)


def write(text: str, path: str | Path) -> Path:
    """Write a file.

    Raises:
        InputError: it cannot be written.
    """
    written = Path(path)
    try:
        written.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{written} cannot be written: {error.strerror or error}") from error
    return written


def free_path(format: str) -> Path:
    """Return a name for a file of a format that is free in the working directory."""
    stem, _, suffix = FORMATS[format].rpartition(".")
    for number in range(1, 10_000):
        path = Path(f"{stem}-{number}.{suffix}")
        if not path.exists():
            return path
    raise InputError("The working directory is full of exported experiments; give export() a path.")


def _runs(experiment: Experiment, model: DiffusionModel | None) -> tuple[Record, Record]:
    opened, kept = experiment.open() if model is None else model, experiment.captures()
    target = experiment.run_target(opened, capture=() if experiment.source_model else kept)
    return experiment.run_source(opened, target, capture=kept), target
