"""Other initial noise for a run: another seed's or one's own, in the whole picture or a part of it."""

from __future__ import annotations

from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, model_validator

from workbench.errors import GuardError, InputError
from workbench.experiments.change import Drawn, Picture, Share
from workbench.experiments.site_changes import Numbers
from workbench.interventions.intervention import spread
from workbench.models import arguments as checks
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record
from workbench.tracing.structure import describe

_CLOSE = 1e-4
_SITE = "latents"


class NoiseSpec(BaseModel):
    """What a run is to begin at in place of its own noise.

    Where only a share of it is taken, the variances of the two are added, so that noise stays noise. A
    sampler that draws in its steps draws other noise there too: its generator has not drawn the initial one.

    Attributes:
        seed: noise of this seed, as the pipeline draws it.
        value: or nested rows of numbers (or a tensor): noise of unit variance of the shape that the pipeline
            takes as ``latents``, or what broadcasts to it.
        mask: which share of the variance each place of the picture gets, rows of numbers from 0 to 1.
        strength: which share everywhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Drawn | None = None
    value: Numbers | None = None
    mask: Picture | None = None
    strength: Share = 1.0

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.seed is None) == (self.value is None):
            raise ValueError("noise is of a seed or a value of one's own: give one of the two")
        return self

    def latents(self, run: Record) -> torch.Tensor:
        """Return what the pipeline is to take as ``latents`` to run again from this noise.

        Raises:
            InputError: the pipeline takes no latents, or the value or mask does not fit them.
        """
        own = own_noise(run)
        assert run.initial is not None
        return mixed(own, self._other(run, own), self._share(run, own)).to(run.initial.dtype)

    def code(self, run: Record, changed: str | None = None) -> str:
        """Return the same as code, on ``drawn`` and ``mixed`` (and ``resized``, with a mask).

        Args:
            run: whose noise it changes.
            changed: what the code calls that run's noise, if it is not what its seed draws.

        Raises:
            InputError: the pipeline does not draw its noise as plain code does.
        """
        own, seed = own_noise(run), run.spec.seed
        if changed is None and not (isinstance(seed, int) and torch.equal(own, drawn(seed, own.shape))):
            raise InputError(
                "The pipeline draws its initial noise in a way of its own, which a standalone script does "
                "not know. Export this one as a script on the workbench: format='workbench'."
            )
        shape = tuple(own.shape)
        other = f"torch.tensor({self.value!r})" if self.seed is None else f"drawn({self.seed}, {shape})"
        share = repr(self.strength)
        if self.mask is not None:
            share = f"resized({[list(row) for row in self.mask]!r}, {shape[-2:]}) * {share}"
        assert run.initial is not None
        rounded = "" if run.initial.dtype == torch.float32 else f".to({run.initial.dtype})"
        return f"mixed({changed or f'drawn({seed}, {shape})'}, {other}, {share}){rounded}"

    def _other(self, run: Record, own: torch.Tensor) -> torch.Tensor:
        if self.seed is None:
            value = torch.tensor(self.value)
            try:
                return value.expand(own.shape)
            except RuntimeError:
                raise InputError(
                    f"value={describe(value)} does not fit the initial noise, {describe(own)}. Give that "
                    "shape, or what broadcasts to it."
                ) from None
        return own_noise(_first_step(run, self.seed))

    def _share(self, run: Record, own: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return torch.tensor(self.strength)
        return spread(torch.tensor(self.mask), own, run.ledger[0], site=_SITE) * self.strength


def own_noise(run: Record) -> torch.Tensor:
    """Return the noise that a run began at, of unit variance, float32, as its pipeline takes ``latents``.

    Raises:
        InputError: the pipeline takes no latents, or the run left no initial ones behind.
    """
    model = run.model
    if not isinstance(model, DiffusionModel) or not checks.takes(model.pipeline, "latents"):
        raise InputError("This pipeline takes no latents, so its runs cannot begin at other noise.")
    if run.initial is None:
        raise InputError("This run did not get as far as its scheduler, so its initial noise is not known.")
    told = run.spec.arguments.get("latents")
    if isinstance(told, torch.Tensor):
        return told.float().cpu()
    if isinstance(run.spec.seed, int):
        same = drawn(run.spec.seed, run.initial.shape)
        if _is_multiple(run.initial, same):
            return same
    # Packed, say: by what the scheduler multiplies is told apart from the noise by the scheduler alone.
    return run.initial.float().cpu() / float(getattr(model.pipeline.scheduler, "init_noise_sigma", 1.0))


def drawn(seed: int, shape: Any) -> torch.Tensor:
    """Return the noise of a seed, as most pipelines draw it."""
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed))


def mixed(own: torch.Tensor, other: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Return noise that is ``other`` for a share of its variance."""
    return (1 - share).sqrt() * own.float() + share.sqrt() * other.float()


def check_begun(run: Record, latents: torch.Tensor) -> None:
    """Refuse a run that did not begin at the latents it was given, times what its scheduler says.

    Raises:
        GuardError: its pipeline makes something else of them.
    """
    model = run.model
    assert isinstance(model, DiffusionModel)
    if run.initial is None or not _is_multiple(run.initial, latents):
        raise GuardError(
            f"{type(model.pipeline).__name__} makes something else of the latents it is given, so no run of "
            "it begins at this noise."
        )


def _is_multiple(latents: torch.Tensor, noise: torch.Tensor) -> bool:
    """Whether latents are some noise times one number above 0, but for rounding."""
    if latents.shape != noise.shape:
        return False
    one, other = latents.float().cpu().flatten(), noise.float().cpu().flatten()
    square = float(other @ other)
    factor = float(one @ other) / square if square else 1.0
    close = max(_CLOSE, 4 * torch.finfo(latents.dtype).eps) * max(float(one.abs().max()), _CLOSE)
    return factor > 0 and torch.allclose(one, factor * other, rtol=0, atol=close)


def _first_step(run: Record, seed: int) -> Record:
    """Return a run like another, of another seed, that ends after its first step."""
    model = run.model
    assert isinstance(model, DiffusionModel)
    arguments = {name: value for name, value in run.spec.arguments.items() if name != "latents"}
    with model.generate(**arguments, seed=seed) as begun:
        if run.ledger.steps > 1:
            begun.go_to_step(1)
            begun.stop()
    return begun.record
