"""Noise in place of what a model is told: the first half of a causal trace.

Meng et al. 2022 (arXiv:2202.05262): corrupt the words, then restore one activation of the clean run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from workbench.errors import InputError
from workbench.interventions.intervention import Intervention
from workbench.tracing.ledger import Row
from workbench.tracing.sites import Site


@dataclass(frozen=True)
class Corrupt(Intervention):
    """Add noise to an activation, the same in every call.

    Attributes:
        site: by default the embedded prompt, as the denoiser is handed it: ``(rows, tokens, width)``.
        branch: which guidance branch; the one with the prompt.
        strength: how large the noise is, in standard deviations of the value; three, as in the paper.
        tokens: which of the value's tokens, counted from 0; None is all.
        seed: of the noise.
    """

    site: str = "unet:inputs[1].encoder_hidden_states"
    branch: str = "cond"
    strength: float = field(default=3.0, kw_only=True)
    tokens: tuple[int, ...] | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Check that there is something to add."""
        super().__post_init__()
        if not isinstance(self.strength, (int, float)) or not math.isfinite(self.strength):
            raise InputError(f"strength={self.strength!r} is no number of standard deviations.")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", tuple(self.tokens))

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return ``value`` with noise added, ``(rows, tokens, width)``; each row's is the same."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        noise = torch.randn(value.shape[1:], generator=generator).to(value.device, value.dtype)
        size = value.flatten(1).std(1).reshape(-1, *[1] * (value.ndim - 1))
        if self.tokens is None:
            return value + self.strength * size * noise
        chosen = list(self.tokens)
        if any(not -value.shape[1] <= each < value.shape[1] for each in chosen):
            raise InputError(f"{site} has {value.shape[1]} tokens; tokens={chosen} names others.")
        changed = value.clone()
        changed[:, chosen] += (self.strength * size * noise)[:, chosen]
        return changed
