"""Noise level and predicted clean sample, from what a scheduler was stepped with.

The formulas are those of the parameterisations: epsilon and sample (Ho et al. 2020,
arXiv:2006.11239), v (Salimans & Ho 2022, arXiv:2202.00512, eq. 9 ff.), noise levels sigma (Karras et
al. 2022, arXiv:2206.00364), flow matching (Lipman et al. 2022, arXiv:2210.02747).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from workbench.tracing.system import parameters

_FLAT = 1e-6
"""How little x₀ may change with the prediction for that to be found from x₀."""


def kind(scheduler: Any) -> str:
    """Return what the model predicts under this scheduler: epsilon, v_prediction, sample or flow."""
    config = getattr(scheduler, "config", {})
    named = str(config.get("prediction_type", "") or "")
    if "FlowMatch" in type(scheduler).__name__ or named == "flow_prediction":
        return "flow"
    return named or "epsilon"


def index_of(scheduler: Any, timestep: float) -> int | None:
    """Return the position in ``scheduler.timesteps`` that the next step will use.

    Args:
        scheduler: any diffusers scheduler after ``set_timesteps``.
        timestep: the timestep it is about to be stepped with.
    """
    position = getattr(scheduler, "step_index", None)
    if position is None:
        position = getattr(scheduler, "begin_index", None)
    if position is not None:
        return int(position)
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return None
    nearest = (timesteps.detach().to("cpu", torch.float64) - timestep).abs()
    return int(nearest.argmin())


def sigma(scheduler: Any, timestep: float) -> float | None:
    """Return the noise level at ``timestep``: σ of the scheduler, or √((1−ᾱ)/ᾱ) where it keeps ᾱ."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        index = index_of(scheduler, timestep)
        if _at_midpoint(scheduler):
            sigmas = scheduler.sigmas_interpol
        return float(sigmas[index]) if index is not None and index < len(sigmas) else None
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None:
        return None
    alpha = float(alphas[min(max(int(timestep), 0), len(alphas) - 1)])
    return float(((1 - alpha) / alpha) ** 0.5) if alpha > 0 else float("inf")


def clean(
    scheduler: Any, model_output: torch.Tensor, sample: torch.Tensor, timestep: float
) -> torch.Tensor | None:
    """Return the predicted clean sample x₀ of one scheduler step.

    Args:
        scheduler: the scheduler, not yet stepped.
        model_output: the guided prediction, ``(batch, channels, ...)``.
        sample: the latents x_t, the same shape (a learned variance in ``model_output`` is left off).
        timestep: the timestep of this step.

    Returns:
        x₀ in float32 and the shape of ``sample``; None where the scheduler's convention is unknown.
    """
    if model_output.ndim != sample.ndim:
        return None
    if model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output[:, : sample.shape[1]]
    if model_output.shape != sample.shape:
        return None
    predicted = _unclipped(scheduler, model_output.float(), sample.float(), timestep)
    limit = _clip(scheduler)
    return predicted if predicted is None or limit is None else predicted.clamp(-limit, limit)


def output_for(
    scheduler: Any, wanted: torch.Tensor, model_output: torch.Tensor, sample: torch.Tensor, timestep: float
) -> torch.Tensor | None:
    """Return the prediction by which x₀ is predicted as wanted; the inverse of `clean`, but for clipping.

    Args:
        scheduler: the scheduler, not yet stepped.
        wanted: the clean sample, in the shape of ``sample``.
        model_output: the guided prediction that there is, whose learned variance, if any, is kept.
        sample: the latents x_t.
        timestep: the timestep of this step.

    Returns:
        It in the shape and dtype of ``model_output``; None where the scheduler's convention is unknown, or
        x₀ does not depend on what is predicted.
    """
    x = sample.float()
    nothing, ones = torch.zeros_like(x), torch.ones_like(x)
    # Predicted x₀ is linear in the prediction and in the sample.
    start = _unclipped(scheduler, nothing, x, timestep)
    slope = _unclipped(scheduler, ones, nothing, timestep)
    if start is None or slope is None or float(slope.abs().min()) < _FLAT:
        return None
    found = ((wanted.float() - start) / slope).to(model_output.dtype)
    return torch.cat([found, model_output[:, x.shape[1] :]], 1)


def _unclipped(scheduler: Any, out: torch.Tensor, x: torch.Tensor, timestep: float) -> torch.Tensor | None:
    """Return x₀ as a prediction and a sample, both float32, give it."""
    scale = _signal_and_noise(scheduler, timestep)
    if scale is None:
        return None
    signal, noise = scale
    if hasattr(scheduler, "precondition_outputs"):
        # Karras et al. 2022, eq. 7: what the network predicts is scaled by its noise level.
        preconditioned: torch.Tensor = scheduler.precondition_outputs(x, out, sigma(scheduler, timestep))
        return preconditioned
    match kind(scheduler):
        case "epsilon":
            return (x - noise * out) / signal if signal else None
        case "v_prediction":
            # v is defined on x / norm: with x = a·x₀ + b·ε, norm² = a² + b².
            norm = math.hypot(signal, noise)
            return signal / norm * (x / norm) - noise / norm * out
        case "flow":
            return x - noise * out
        case "sample":
            return out
    return None


def _at_midpoint(scheduler: Any) -> bool:
    """Whether the next step is the second of KDPM2's two, at a noise level between two of its sigmas.

    The ancestral variant's is the next sigma itself: √(σ·σ_down) with σ_down = σ_next² / σ.
    """
    return (
        hasattr(scheduler, "sigmas_interpol")
        and not hasattr(scheduler, "sigmas_up")
        and not scheduler.state_in_first_order
    )


def _clip(scheduler: Any) -> float | None:
    """Return the bound the scheduler clips its predicted sample to, or None.

    A configuration may hold another scheduler's ``clip_sample``, which this one ignores.
    """
    clips = "clip_sample" in parameters(type(scheduler).__init__)
    if not clips or not scheduler.config.get("clip_sample"):
        return None
    return float(scheduler.config.get("clip_sample_range", 1.0))


def _signal_and_noise(scheduler: Any, timestep: float) -> tuple[float, float] | None:
    """Return (a, b) of x_t = a·x₀ + b·ε in the scale of the scheduler's samples."""
    level = sigma(scheduler, timestep)
    if level is None:
        return None
    if kind(scheduler) == "flow":
        return 1 - level, level
    if level == float("inf"):
        return 0.0, 1.0
    variance_exploding = (
        getattr(scheduler, "sigmas", None) is not None
        and float(getattr(scheduler, "init_noise_sigma", 1.0)) > 1.0001
    )
    if variance_exploding:
        return 1.0, level
    norm = (1 + level**2) ** 0.5
    return 1 / norm, level / norm
