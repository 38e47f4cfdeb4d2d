"""Attribution patching: a whole map of patches, estimated from two runs and one way back.

A patch moves an activation by ``source − target``; to first order, a number of the result then moves by
that difference times the number's derivative there (Nanda 2023, "Attribution patching"; Syed et al. 2023,
arXiv:2310.10348). One backward pass has the derivatives of every site and step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr

from workbench.errors import InputError
from workbench.experiments.experiment import Experiment
from workbench.experiments.site_changes import PatchSpec
from workbench.experiments.taps import Handed, Measuring, Mixing, Products
from workbench.experiments.windows import window as steps_of
from workbench.tracing.capture import Capture
from workbench.tracing.gradient import Differentiation
from workbench.tracing.record import Record
from workbench.tracing.session import Listener
from workbench.tracing.sites import Site

RESULTS = ("pred_x0", "latents", "noise_pred")
"""What a number can be taken of: the last of these values of a run."""

Number = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Agreement:
    """Cells of a map that were run, beside what was estimated of them.

    Attributes:
        window: which steps a cell covers.
        cells: ``(site, step)`` of each, as indices of the map.
        exact: how far each patched run's number moved, ``(cells,)``.
        estimated: how far it should have, ``(cells,)``.
    """

    window: str
    cells: tuple[tuple[int, int], ...]
    exact: np.ndarray
    estimated: np.ndarray

    @property
    def correlation(self) -> float:
        """Spearman's rank correlation of the two; NaN where one of them is constant."""
        if min(np.ptp(self.exact), np.ptp(self.estimated)) == 0:
            return float("nan")
        return float(spearmanr(self.exact, self.estimated).statistic)


@dataclass(frozen=True)
class Attribution:
    """What each patch of one pair of runs would change, estimated.

    Attributes:
        sites: the rows.
        values: how far the number would move with a patch in one step, ``(sites, steps)``, float64. The
            number is, unless another was given, how far the result moves from the target's, 0, to the
            source's, 1.
        agreement: with patches that were really made, on a sample of the cells; None if none was asked for.
    """

    sites: tuple[Site, ...]
    values: np.ndarray
    agreement: Agreement | None = None

    def over(self, window: str) -> np.ndarray:
        """Return what patches over a window of steps would do, ``(sites, steps)``: to first order, the sum.

        Args:
            window: which steps a cell covers, see `workbench.experiments.windows`.
        """
        count = self.values.shape[1]
        columns = [self.values[:, list(steps_of(window, step, count))].sum(1) for step in range(count)]
        return np.stack(columns, 1)


def attribute(
    experiment: Experiment,
    source: Record,
    target: Record,
    sites: Sequence[str | Site],
    *,
    of: Number | None = None,
    result: str = "pred_x0",
    branch: str = "cond",
    window: str = "1",
    check: int = 0,
    seed: int = 0,
    points: int = 1,
    listener: Listener | None = None,
) -> Attribution:
    """Estimate a whole map of patches from two runs and one way back.

    The source is run once more, and keeps its activations; then the target, with its graph. Each call of
    the denoiser is computed again on the way back, so that besides the activations of one run no more than
    one call's are there.

    A colour, say, is decided at once: many a patch of one step takes the whole picture over, while the slope
    at the target, where it is decided already, is a hundredth of that. Ranks agree, sizes do not, and where
    ranks do not either, slopes on the way to the source know more: with ``points`` their mean is taken
    (integrated gradients, Sundararajan et al. 2017, arXiv:1703.01365; along the inputs, Hanna et al. 2024,
    arXiv:2403.17806).

    Args:
        experiment: the plain experiment, without patches.
        source: its source's run.
        target: its target's run.
        sites: the rows.
        of: makes the number, with torch, of a run's result; None is `towards`, of the source's result.
        result: of which result: the last ``"pred_x0"``, ``"latents"`` or ``"noise_pred"``.
        branch: which guidance branch is patched.
        window: which steps a patch covers that is made to compare with.
        check: how many patches are really made, to tell how well the estimate agrees; each is a run.
        seed: which: a choice among the cells, without repetition.
        points: 1 takes the derivative at the target; more take it in the middle of as many parts of the way
            from the target to the source, where the denoiser is handed a mixture of what it is in the two,
            but for the latents. Each is a run, and the way back.
        listener: told how the runs go on.

    Raises:
        InputError: a result that the runs do not have or that is the same in both, a number without a graph,
            too many to check, or several points between runs that only their noise tells apart.
        UnknownNameError: the model has no such site, or there is no such window.
    """
    found = tuple(Site.parse(each) for each in sites)
    if not found:
        raise InputError("sites is empty. Name the rows of the map: ['unet.mid_block'].")
    branch = branch if branch in target.ledger.branches else "all"
    before, wanted = _result(target, result), _result(source, result)
    if of is None and torch.equal(before, wanted):
        raise InputError("Source and target end alike, so nothing is on the way from one to the other.")
    number = partial(_towards, target=before, source=wanted) if of is None else of
    first, count = experiment.source_from, target.ledger.steps
    steps = range(first, count)
    cells = _sample(len(found), steps, check, seed)
    patches = [
        PatchSpec(site=str(found[site]), steps=steps_of(window, step, count), branch=branch)
        for site, step in cells
    ]
    if points < 1:
        raise InputError(f"points={points}: give 1, at the target alone, or more.")
    handed = Handed()
    kept = [Capture(str(site), steps=steps, branch=branch) for site in found]
    own = source.fork(first, capture=[*kept, handed], listener=listener)
    products = Products(own, found, steps, branch)
    if points > 1:
        target.fork(first, capture=[Measuring(products)], interventions=(), listener=listener)
    for point in range(points):
        probe = Differentiation(number, taps=products, result=result, result_step=count - 1)
        mixing = [Mixing(handed, (point + 0.5) / points)] if points > 1 else []
        target.fork(first, capture=[*mixing, probe], interventions=(), listener=listener)
    values = np.array([[products.values[site, step] for step in range(count)] for site in found])
    made = Attribution(found, values / points)
    if not cells:
        return made
    start = float(number(before))
    patched = _patched(experiment, source, target, patches, listener)
    exact = np.array([float(number(_result(record, result))) - start for record in patched])
    estimated = np.array([made.over(window)[cell] for cell in cells])
    return replace(made, agreement=Agreement(window, cells, exact, estimated))


def _patched(
    experiment: Experiment,
    source: Record,
    target: Record,
    patches: Sequence[PatchSpec],
    listener: Listener | None,
) -> Iterator[Record]:
    """Yield a run with each patch, the source run once more for all their sites."""
    first, branch = experiment.source_from, patches[0].branch
    steps = range(first, target.ledger.steps)
    kept = [Capture(site, steps=steps, branch=branch) for site in {patch.site: None for patch in patches}]
    again = source.fork(first, capture=kept, listener=listener)
    for patch in patches:
        one = experiment.model_copy(update={"interventions": (patch,)})
        record = one.patch(again, target, listener=listener)
        assert record is not None
        yield record


def _sample(sites: int, steps: range, count: int, seed: int) -> tuple[tuple[int, int], ...]:
    """Return cells of a map, ``(site, step)``, each once."""
    every = sites * len(steps)
    if not count:
        return ()
    if not 2 <= count <= every:
        raise InputError(f"check={count}: an agreement takes from 2 to all {every} cells; 0 is none.")
    chosen = np.random.default_rng(seed).choice(every, count, replace=False)
    return tuple((int(cell) // len(steps), steps[int(cell) % len(steps)]) for cell in chosen)


def _result(record: Record, name: str) -> torch.Tensor:
    """Return a run's last value of a name, ``(batch, channels, ...)``."""
    if name not in RESULTS:
        raise InputError(f"result={name!r} is none of {', '.join(RESULTS)}.")
    value = record.ticks[-1][name]
    if value is None:
        raise InputError(
            "The predicted clean sample of this scheduler is not known: its convention is none of ours. "
            "Give result='latents'."
        )
    return value


def _towards(value: torch.Tensor, *, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Return how far a result has moved from the target's to the source's, as `metrics.towards` does.

    Its derivative at the target is that of the squared distance to the source, divided by twice the whole
    distance's square and with the other sign.
    """
    here = value.to(torch.promote_types(value.dtype, torch.float32))
    start = target.to(here)
    way = source.to(here) - start
    return ((here - start) * way).sum() / (way**2).sum()
