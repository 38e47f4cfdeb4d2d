"""Modules of one's own, as an experiment names them; they know nothing of the workbench."""

from __future__ import annotations

import torch


class Halving(torch.nn.Module):
    """A module of one's own, which `ModuleSpec` names."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self.share = share

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value * self.share


class Pairs:
    """An autoencoder with a feature a channel, the last axis of what it is given."""

    def encode(self, value: torch.Tensor) -> torch.Tensor:
        return value.relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return features * 2
