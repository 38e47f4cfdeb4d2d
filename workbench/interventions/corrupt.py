"""Noise in place of what a model is told: the first half of a causal trace.

Meng et al. 2022 (arXiv:2202.05262): corrupt the words, then restore one activation of the clean run.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from workbench.interventions.intervention import Intervention
from workbench.tracing.ledger import Row
from workbench.tracing.sites import Site


@dataclass(frozen=True)
class Corrupt(Intervention):
    """Add noise to an activation, the same in every call.

    Attributes:
        site: by default the embedded prompt, as the denoiser is handed it: ``(rows, tokens, width)``.
        branch: which guidance branch; the one with the prompt.
        strength: how large the noise is, in standard deviations of what is changed; three, as in the paper.
        seed: of the noise.
    """

    site: str = "unet:inputs[1].encoder_hidden_states"
    branch: str = "cond"
    strength: float = field(default=3.0, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def new_value(self, site: Site, value: torch.Tensor, row: Row, branch: str) -> torch.Tensor:  # noqa: ARG002
        """Return ``value`` with noise of its own size, ``(rows, ...)``; each row's is the same."""
        generator = torch.Generator("cpu").manual_seed(self.seed)
        noise = torch.randn(value.shape[1:], generator=generator).to(value.device, value.dtype)
        return value + value.flatten(1).std(1).reshape(-1, *[1] * (value.ndim - 1)) * noise
