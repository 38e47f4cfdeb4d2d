"""What the app's worker does: the runs behind the views, and what the views are given of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from PIL import Image

from workbench import zoo
from workbench.attention.request import Attention
from workbench.errors import GuardError, InputError
from workbench.experiments.experiment import Experiment
from workbench.experiments.metrics import difference, towards
from workbench.experiments.patchmap import PatchMap
from workbench.experiments.sampler import put_scheduler
from workbench.models.asked import Captured
from workbench.models.decoding import Decoder, is_image_run
from workbench.models.model import DiffusionModel
from workbench.models.outline import patch_sites
from workbench.models.shapes import Shapes
from workbench.tracing.memory import free_memory
from workbench.tracing.record import Record
from workbench.tracing.session import Listener
from workbench.zoo import shapes

_SHARE_OF_MEMORY = 0.25


@dataclass
class Pair:
    """A source and a target run, and the map between them.

    Attributes:
        experiment: what was run, without patches.
        source: the source's run.
        target: the target's run.
        map: the patch map, empty until cells are computed.
        seconds: how long the target's run took.
        floor: what another seed alone does to the two measures: (towards, difference); None until known.
        lanes: what the scrubber shows of both, empty until made.
    """

    experiment: Experiment
    source: Record
    target: Record
    map: PatchMap
    seconds: float
    floor: tuple[float, float] | None = None
    lanes: list[dict[str, Any]] = field(default_factory=list)


class Stage:
    """Owns what is needed to run pairs of one model."""

    def __init__(self, model: DiffusionModel) -> None:
        self.model = model
        self.decoder = Decoder(model)
        self._own_scheduler: Any = None

    def sample_as(self, experiment: Experiment) -> None:
        """Let the model have an experiment's scheduler; where that says none, the one that it came with."""
        if self._own_scheduler is not None:
            self.model.pipeline.scheduler, self._own_scheduler = self._own_scheduler, None
        if experiment.scheduler is not None:
            own = self.model.pipeline.scheduler
            put_scheduler(self.model, experiment.scheduler)
            self._own_scheduler = None if self.model.pipeline.scheduler is own else own

    def run_pair(self, experiment: Experiment, window: str, listener: Any) -> Pair:
        """Run target and source of an experiment; afterwards the model knows its shapes.

        Activations for the patch map are kept from the source's run if they fit in a quarter of the
        free memory; otherwise a click runs the source once more for its own site.
        """
        seen = Shapes()
        listener.label, began = "target", time.monotonic()
        target = self._with_attention(
            lambda capture: experiment.run_target(self.model, capture=(*capture, seen), listener=listener)
        )
        seconds = time.monotonic() - began
        if not is_image_run(target):
            raise InputError(
                f"The app compares pictures, and this run returned {type(target.output).__name__}. A loop of "
                "your own returns a PIL image, or a list of them."
            )
        self.model.shapes = seen.text()
        sites = patch_sites(self.model.denoisers, seen)
        needed = sum(seen.bytes[site.path] for site in sites) * len(target.ledger)
        fits = needed <= free_memory() * _SHARE_OF_MEMORY
        listener.label = "source"
        kept = (*experiment.captures(), *(map(str, sites) if fits else ()))
        source = self._with_attention(
            lambda capture: experiment.run_source(
                self.model, target, capture=(*capture, *kept), listener=listener
            )
        )
        plain = experiment.plain()
        return Pair(plain, source, target, PatchMap(plain, source, target, sites, window=window), seconds)

    def measure_floor(self, pair: Pair, listener: Listener) -> tuple[float, float]:
        """Return what one other seed does to the measures, with no patch at all."""
        settings = pair.experiment.settings()
        taken = {pair.experiment.seed, pair.experiment.source_seed}
        seed = next(n for n in count(pair.experiment.seed + 1) if n not in taken)
        other = self.model.record(pair.experiment.target, seed=seed, listener=listener, **settings)
        image, target, source = other.images[0], pair.target.images[0], pair.source.images[0]
        return towards(image, target, source), difference(image, target)

    def preview(self, latents: torch.Tensor | None, size: tuple[int, int] | None) -> Image.Image | None:
        """Return a picture of a predicted clean sample; None where the decoder cannot make one.

        Args:
            latents: ``(batch, channels, rows, columns)``, or packed.
            size: ``(width, height)`` of the picture, needed for packed latents; None before a run.
        """
        if latents is None or self.decoder.refused or (size is None and latents.ndim != 4):
            return None
        try:
            return self.decoder.decode(latents[:1], size or (0, 0))[0]
        except (AttributeError, TypeError, ValueError, RuntimeError):
            # Another autoencoder, another packing: the run itself says later whether pictures can be had.
            return None

    def describe(self, image: Image.Image) -> str:
        """Say what is in a picture, for models of a world whose pictures can be read."""
        if self.model.reference not in zoo.models():
            return ""
        return str(shapes.read(image))

    def _with_attention(self, run: Callable[[tuple[Captured, ...]], Record]) -> Record:
        """Run with attention where the model's can be seen; without, where it cannot."""
        try:
            return run((Attention(dtype=torch.float16),))
        except GuardError:
            return run(())
