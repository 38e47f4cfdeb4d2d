"""Inversion: the noise that a picture comes from, so that a real one can be patched and edited.

A deterministic sampler is run backwards: Song et al., 2021 (arXiv:2010.02502) for DDIM, the flow's equation
backwards for rectified flow. Each step is solved for the latents that it would turn into those at hand, by
fixed-point iteration (Pan et al., 2023, arXiv:2309.04907), so that the run comes back to the picture.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from workbench.attention.geometry import by_name
from workbench.errors import GuardError, InputError
from workbench.models import arguments as checks
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record
from workbench.tracing.session import Listener
from workbench.tracing.structure import describe, leaves, map_tensors

_CLOSE = 1e-4
_LOST, _REMEMBERED = 1e3, 6
"""When to give a step up, and how many earlier tries the next one is made of."""


@dataclass(frozen=True)
class Inversion:
    """Where a picture comes from.

    Attributes:
        picture: the picture, at the size that the model makes.
        latents: the noise, as the pipeline takes it: ``model.record(prompt, latents=inversion.latents)``.
        record: the run from that noise without guidance: it ends at the picture as the autoencoder has it.
        residual: how far the worst step, run forwards, misses what it was solved for, of the largest latent.
    """

    picture: Image.Image
    latents: torch.Tensor = field(repr=False)
    record: Record = field(repr=False)
    residual: float


def invert(
    model: DiffusionModel,
    picture: Image.Image,
    prompt: Any = None,
    *,
    iterations: int = 30,
    tolerance: float = 1e-5,
    listener: Listener | None = None,
    **arguments: Any,
) -> Inversion:
    """Return the noise that a picture comes from.

    Args:
        model: with a sampler that is deterministic and remembers nothing of earlier steps: DDIM, or Euler of
            a flow.
        picture: resized to what the model makes, if it is of another size.
        prompt: what is in it; the better it says so, the better the noise.
        iterations: at most so many calls of the denoiser a step.
        tolerance: how close each step must come, of the largest latent, to be done with fewer.
        listener: told of each call of the denoiser; an exception it raises ends the search.
        **arguments: the pipeline's own, such as ``num_inference_steps``; without guidance, which cannot be
            run backwards well, unless ``guidance_scale`` is given.

    Returns:
        The noise, and the run from it.

    Raises:
        InputError: this is no picture, or the pipeline takes no ``latents``.
        GuardError: the sampler cannot be run backwards, or the pipeline does more between denoiser and
            scheduler than hand on what the one says.

    Example:
        >>> found = invert(model, Image.open("photo.png"), "a red circle", num_inference_steps=50)
        >>> edited = model.record("a blue circle", latents=found.latents, num_inference_steps=50)
    """
    if not isinstance(picture, Image.Image):
        raise InputError(
            f"picture={type(picture).__name__} is no picture. Give a PIL image: Image.open(path)."
        )
    if not checks.takes(model.pipeline, "latents"):
        raise InputError(
            f"{type(model.pipeline).__name__} takes no latents, so there is no noise to give it. A loop of "
            "your own, traced, can."
        )
    if checks.takes(model.pipeline, "guidance_scale"):
        arguments = {"guidance_scale": 1.0, **arguments}
    sampler = _Sampler(model, prompt, arguments, listener)
    resized = picture.convert("RGB").resize(sampler.size, Image.Resampling.LANCZOS)
    with torch.no_grad():
        latents, residual = sampler.encode(resized), 0.0
        for step in reversed(range(sampler.steps)):
            latents, missed = sampler.before(step, latents, iterations, tolerance)
            residual = max(residual, missed)
    given = latents / sampler.first_scale
    record = model.record(prompt, latents=given, listener=listener, **arguments)
    assert record.initial is not None
    if not torch.allclose(record.initial.to(latents), latents, atol=_CLOSE * float(latents.abs().max())):
        raise GuardError(
            f"{type(model.pipeline).__name__} makes something else of the latents it is given, so no run of "
            "it begins with this noise."
        )
    return Inversion(resized, given, record, residual)


class _Sampler:
    """One run's sampler, step by step, for any latents."""

    def __init__(
        self, model: DiffusionModel, prompt: Any, arguments: dict[str, Any], listener: Listener | None
    ) -> None:
        self._model = model
        self._listener = listener
        sites = [f"{name}:{port}" for name in model.denoisers for port in ("inputs", "output")]
        self._run = model.record(prompt, seed=0, capture=sites, listener=listener, **arguments)
        self.size = self._run.images[0].size
        self.steps = len(self._run.ticks)
        self._scheduler = copy.deepcopy(model.pipeline.scheduler)
        self.first_scale = float(getattr(self._scheduler, "init_noise_sigma", 1.0))
        self._check()

    def encode(self, picture: Image.Image) -> torch.Tensor:
        """Return a picture as the latents that the last step leaves, without noise."""
        pipeline, vae = self._model.pipeline, self._model.components.get("vae")
        processor = getattr(pipeline, "image_processor", None)
        assert self._run.initial is not None
        like = self._run.initial
        if vae is None or processor is None:
            raise GuardError(f"{type(pipeline).__name__} has no autoencoder that a picture goes through.")
        pixels = processor.preprocess(picture, height=picture.height, width=picture.width)
        coded = vae.encode(pixels.to(vae.device, vae.dtype))
        latents = coded.latent_dist.mode() if hasattr(coded, "latent_dist") else coded[0]
        latents = (latents - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        if like.ndim == 3 and hasattr(pipeline, "_pack_latents"):
            latents = pipeline._pack_latents(latents, *latents.shape)
        if latents.shape != like.shape:
            raise GuardError(
                f"The picture's latents are {describe(latents)} and the run's {describe(like)}: "
                f"{type(pipeline).__name__} packs them in a way that is not known here."
            )
        found: torch.Tensor = latents.to(like)
        return found

    def before(
        self, step: int, after: torch.Tensor, iterations: int, tolerance: float
    ) -> tuple[torch.Tensor, float]:
        """Return the latents that a step turns into ``after``, and by how much it misses that."""
        best, least, latents = after, float("inf"), after
        size, share = float(after.abs().max()) or 1.0, self._share(step, after)
        tried: list[tuple[torch.Tensor, torch.Tensor]] = []
        for _ in range(iterations):
            miss = (after - self._forward(step, latents)) / share
            missed = float(miss.abs().max()) * abs(share) / size
            if missed < least:
                best, least = latents, missed
            if missed <= tolerance or not missed < _LOST:
                break
            tried = [*tried[-_REMEMBERED:], (latents, miss)]
            latents = _next(tried)
        return best, least

    def _share(self, step: int, latents: torch.Tensor) -> float:
        """Return how much of latents is left after a step that predicts the same for all of them."""
        predicted, small = torch.zeros_like(latents), torch.ones_like(latents)
        apart = self._stepped(step, predicted, small) - self._stepped(step, predicted, -small)
        return float(apart.mean()) / 2

    def _forward(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        """Return what a step makes of latents."""
        row = self._run.ledger[step]
        if self._listener is not None:
            self._listener.started(row)
        denoiser = self._model.denoisers[row.component]
        args, kwargs = self._run.passages(f"{row.component}:inputs")[step].value
        device = next(denoiser.parameters()).device
        named = map_tensors(by_name(denoiser, args, kwargs), lambda tensor: tensor.to(device))
        scaled = self._scaled(step, latents)
        output = denoiser(**{**named, _name(named): scaled.to(named[_name(named)])})
        return self._stepped(step, next(tensor for _, tensor in leaves(output)), latents)

    def _scaled(self, step: int, latents: torch.Tensor) -> torch.Tensor:
        scheduler = self._at(step)
        if not hasattr(scheduler, "scale_model_input"):
            return latents
        scaled: torch.Tensor = scheduler.scale_model_input(latents, scheduler.timesteps[step])
        return scaled

    def _stepped(self, step: int, predicted: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        scheduler = self._at(step)
        found: torch.Tensor = scheduler.step(
            predicted.to(latents), scheduler.timesteps[step], latents, return_dict=False
        )[0]
        return found

    def _at(self, step: int) -> Any:
        if hasattr(self._scheduler, "_step_index"):
            self._scheduler._step_index = step
        return self._scheduler

    def _check(self) -> None:
        """Refuse what cannot be run backwards, by trying whether the run's own steps come out again."""
        run, scheduler = self._run, type(self._scheduler).__name__
        if len(run.ledger) != self.steps or self.steps != len(self._scheduler.timesteps):
            raise GuardError(f"{scheduler} calls the denoiser more than once a step. {_ELSE}")
        before = [run.initial, *(tick["latents"] for tick in run.ticks)]
        for step in reversed(range(self.steps)):
            row = run.ledger[step]
            args, kwargs = run.passages(f"{row.component}:inputs")[step].value
            named = by_name(self._model.denoisers[row.component], args, kwargs)
            output = next(tensor for _, tensor in leaves(run.passages(row.component)[step].value))
            start, end, predicted = before[step], before[step + 1], run.ticks[step]["noise_pred"]
            assert start is not None
            assert end is not None
            assert predicted is not None
            if not _same(named[_name(named)], self._scaled(step, start)) or not _same(output, predicted):
                raise GuardError(
                    f"{type(self._model.pipeline).__name__} changes what its denoiser is given or says, as "
                    "with guidance or a mask, so its steps cannot be run backwards. Leave guidance out."
                )
            if not _same(self._stepped(step, predicted, start), end):
                raise GuardError(f"{scheduler} draws noise or remembers earlier steps. {_ELSE}")


_ELSE = (
    "Take one that can be run backwards: DDIM, or Euler of a flow, as in "
    "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)."
)


def _name(named: dict[str, Any]) -> str:
    return "sample" if "sample" in named else "hidden_states"


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    size = float(other.abs().max()) or 1.0
    return float((one.float() - other.float()).abs().max()) <= _CLOSE * size


def _next(tried: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return where to try next: from the mixture of tries that misses least (Anderson, 1965)."""
    latents, miss = tried[-1]
    if len(tried) == 1:
        return latents + miss
    places = torch.stack([(latents - other).flatten().double() for other, _ in tried[:-1]], 1)
    misses = torch.stack([(miss - other).flatten().double() for _, other in tried[:-1]], 1)
    mixed = torch.linalg.lstsq(misses.cpu(), miss.flatten().double().cpu()[:, None], driver="gelsd").solution
    moved = (
        latents.flatten().double() + miss.flatten().double() - ((places + misses) @ mixed.to(misses))[:, 0]
    )
    found: torch.Tensor = moved.reshape(latents.shape).to(latents)
    return found
