"""Steering: an activation moved along a direction, that of a concept or a feature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from workbench.errors import InputError, ShapeError, UnknownNameError, nearest
from workbench.interventions.given import check_given, fitted
from workbench.interventions.intervention import Intervention, Places
from workbench.tracing.ledger import ALL, Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site
from workbench.tracing.steps import Steps, covers, normal
from workbench.tracing.structure import describe


@dataclass(frozen=True)
class Steer(Intervention):
    """Add a direction to an activation, ``strength`` times.

    At a UNet's bottleneck, ``unet.mid_block``, this is a shift in h-space (Kwon et al., 2023,
    arXiv:2210.10960); the direction between prompts is that of Turner et al., 2023 (arXiv:2308.10248).

    Attributes:
        direction: of one sample, the value's shape without its rows, or what broadcasts to that:
            ``(width,)`` moves every token alike, ``(channels, 1, 1)`` every place of a picture.
    """

    direction: torch.Tensor = field(kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that there is a direction."""
        super().__post_init__()
        check_given(self.direction, "direction", " Steer.between(…) finds one, or give your own.")

    @classmethod
    def between(
        cls,
        site: str,
        towards: Sequence[Record],
        away: Sequence[Record],
        *,
        steps: Steps = None,
        branch: str = ALL,
        method: str = "mean",
        seen: Sequence[tuple[Places, Places]] = (),
        **where: object,
    ) -> Steer:
        """Find the direction from some runs to others, pair by pair, over the steps together.

        Args:
            site: captured by all of them.
            towards: runs that have what is to be added.
            away: as many that have not: the same noise, and a prompt that says it not.
            steps: the steps to look at, and to act on.
            branch: the branch to look at, and to act on.
            method: ``"mean"`` of the differences, or ``"pca"``: their first principal component through
                the origin, as long as the mean along it, and pointing the way it does (Zou et al., 2023,
                arXiv:2310.01405).
            seen: of each pair, which places of the sequence to look at in the one and in the other; none is
                those that are acted on.
            **where: ``heads``, ``tokens``, ``samples``, ``mask`` and ``strength``, as of any intervention.

        Raises:
            InputError: not as many of the one as of the other, or none.
            ShapeError: of a pair, more places are looked at in the one than in the other.
            UnknownNameError: no such method.
        """
        if not towards or len(towards) != len(away):
            raise InputError(f"{len(towards)} runs towards and {len(away)} away: give pairs.")
        if method not in ("mean", "pca"):
            raise UnknownNameError(f"method={method!r}.{nearest(method, ('mean', 'pca'))}")
        like = cls(site, steps, branch, direction=torch.zeros(1), **where)  # type: ignore[arg-type]
        places = seen or [(None, None)] * len(towards)
        pairs = [
            (like._seen(one, here), like._seen(other, there))
            for one, other, (here, there) in zip(towards, away, places, strict=True)
        ]
        for pair in pairs:
            if any(each.shape != pairs[0][0].shape for each in pair):
                raise ShapeError(
                    f"At {site} one run has {describe(pairs[0][0][0])} to look at and another "
                    f"{describe(next(each for each in pair if each.shape != pairs[0][0].shape)[0])}: a "
                    "direction is between as many places. Take words of as many tokens in every prompt."
                )
        differences = torch.stack([one - other for one, other in pairs])
        mean = differences.mean((0, 1))
        if method == "pca":
            flat = differences.flatten(0, 1).flatten(1)
            first = torch.linalg.svd(flat, full_matrices=False).Vh[0]
            mean = ((mean.flatten() @ first) * first).reshape(mean.shape)
        return cls(site, steps, branch, direction=mean, **where)  # type: ignore[arg-type]

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return ``value`` and the direction, ``(rows, ...)``."""
        return value + fitted(self.direction, "direction", value, site, row)

    def _seen(self, record: Record, tokens: Places = None) -> torch.Tensor:
        """Return what a run has at the site where this acts, a mean over rows for each step."""
        site, steps = Site.parse(self.site), record.ledger.steps
        rows = [next(iter(record.ledger.at(step, self.branch))) for step in range(steps)]
        chosen = [row.step for row in rows if covers(normal(self.steps), row, steps)]
        values = [record.at(site, step=step, branch=self.branch) for step in chosen]
        return torch.stack([value[self.place(site, value, tokens)].mean(0) for value in values]).float()
