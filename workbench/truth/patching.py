"""Does a patch carry what it is said to carry? Its rate over seeds, beside two controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from workbench.experiments.experiment import Experiment
from workbench.experiments.site_changes import PatchSpec
from workbench.interventions.control import RandomDirection
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.zoo import shapes


@dataclass(frozen=True)
class Rates:
    """How many of the seeds read as asked.

    Attributes:
        seeds: how many were run.
        source: the source's own run.
        target: the target's own run.
        patched: with the patch.
        elsewhere: with the same patch at another site.
        random: with a random direction of the patch's norm in its place.
    """

    seeds: int
    source: int
    target: int
    patched: int
    elsewhere: int
    random: int

    def __str__(self) -> str:
        """Return the rates as a table."""
        rows = [
            ("the source itself", self.source),
            ("the target, unpatched", self.target),
            ("patched", self.patched),
            ("the same patch at the other site", self.elsewhere),
            ("a random direction of the same norm", self.random),
        ]
        return "\n".join(f"{name:<36} {count:>3} of {self.seeds}" for name, count in rows)


def colour_rates(
    model: DiffusionModel,
    experiment: Experiment,
    *,
    colour: str,
    elsewhere: str,
    seeds: Sequence[int],
) -> Rates:
    """Return how often the first object reads as ``colour``, with a patch and with its controls.

    Args:
        model: a model of the shapes world.
        experiment: two prompts and one patch between them.
        colour: the colour that the source's prompt names and the target's does not.
        elsewhere: the other site.
        seeds: each gives one source, target and patched run.
    """
    patch = experiment.interventions[0]
    assert isinstance(patch, PatchSpec)
    other = PatchSpec(site=elsewhere, steps=patch.steps, branch=patch.branch)
    counts = dict.fromkeys(("source", "target", "patched", "elsewhere", "random"), 0)
    for seed in seeds:
        at_seed = experiment.model_copy(update={"seed": seed})
        target = at_seed.run_target(model)
        source = at_seed.run_source(model, target, capture=(patch.site, elsewhere))
        there = at_seed.model_copy(update={"interventions": (other,)})
        bound = at_seed.bound(source, target)
        control = [RandomDirection.of(each, seed) for each in bound if isinstance(each, Patch)]
        first = at_seed.first_step(target.ledger.steps)
        runs = {
            "source": source,
            "target": target,
            "patched": at_seed.patch(source, target),
            "elsewhere": there.patch(source, target),
            "random": target.fork(first, interventions=control),
        }
        for name, record in runs.items():
            counts[name] += record is not None and has_colour(record.images[0], colour)
    return Rates(len(seeds), **counts)


def has_colour(image: Image.Image, colour: str) -> bool:
    """Whether a picture reads as exactly one object, of that colour."""
    things = shapes.read(image).things
    return len(things) == 1 and things[0].colour == colour
