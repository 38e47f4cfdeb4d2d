"""Noise level and predicted clean sample, from what a scheduler was stepped with.

The formulas are those of the parameterisations: epsilon and sample (Ho et al. 2020,
arXiv:2006.11239), v (Salimans & Ho 2022, arXiv:2202.00512, eq. 9 ff.), noise levels sigma (Karras et
al. 2022, arXiv:2206.00364), flow matching (Lipman et al. 2022, arXiv:2210.02747).
"""

from __future__ import annotations

from typing import Any

import torch

from workbench.tracing.system import parameters


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
    scale = _signal_and_noise(scheduler, timestep)
    if scale is None or model_output.ndim != sample.ndim:
        return None
    if model_output.shape[1] == 2 * sample.shape[1]:
        model_output = model_output[:, : sample.shape[1]]
    if model_output.shape != sample.shape:
        return None
    signal, noise = scale
    x, out = sample.float(), model_output.float()
    if hasattr(scheduler, "precondition_outputs"):
        # Karras et al. 2022, eq. 7: what the network predicts is scaled by its noise level.
        preconditioned: torch.Tensor = scheduler.precondition_outputs(x, out, sigma(scheduler, timestep))
        return preconditioned
    norm = (signal**2 + noise**2) ** 0.5
    by_kind: dict[str, torch.Tensor | None] = {
        "epsilon": (x - noise * out) / signal if signal else None,
        # v is defined on x / norm: with x = a·x₀ + b·ε, norm² = a² + b².
        "v_prediction": signal / norm * (x / norm) - noise / norm * out,
        "flow": x - noise * out,
        "sample": out,
    }
    predicted = by_kind.get(kind(scheduler))
    limit = _clip(scheduler)
    return predicted if predicted is None or limit is None else predicted.clamp(-limit, limit)


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
