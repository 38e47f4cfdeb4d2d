"""The component tree of a large model from its configurations: seconds and memory above the imports'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from tests.benchmarks.processes import inside
from tests.benchmarks.table import Row, Setting
from tests.tiny import large

_IMPORTS = """
import diffusers, transformers, workbench
from workbench.models.outline import outline
workbench.DiffusionModel("shapes-unet", dispatch=False)
{imports}
"""
_TREE = """
model = workbench.DiffusionModel({folder!r}, dispatch=False)
outline(model)
"""
_CLASSES = {
    "sdxl": "diffusers.StableDiffusionXLPipeline, transformers.CLIPTextModelWithProjection",
    "flux": "diffusers.FluxPipeline, diffusers.FluxTransformer2DModel, transformers.T5EncoderModel",
}


def rows(_: Setting) -> Iterator[Row]:
    """Yield both models' rows."""
    for name, classes in _CLASSES.items():
        with TemporaryDirectory() as folder:
            large.write(Path(folder), name)
            before, tree = _IMPORTS.format(imports=classes), _TREE.format(folder=folder)
            measured = [inside(before, tree) for _ in range(3)]
        seconds, peak = (median(each) for each in zip(*measured, strict=True))
        yield Row(
            f"component tree of {name}, no weights", f"{seconds:.1f} s, {peak / 1024:.0f} MiB above imports"
        )
