"""Tensors that are given to an intervention: what they can be, and whether they fit an activation."""

from __future__ import annotations

from typing import Any

import torch

from workbench.errors import InputError, ShapeError
from workbench.tracing.ledger import Row
from workbench.tracing.sites import Site
from workbench.tracing.structure import describe


def check_given(given: Any, name: str, instead: str = "") -> None:
    """Refuse what is no tensor of finite numbers with an axis.

    Raises:
        InputError: with the name, and what else there is.
    """
    if not isinstance(given, torch.Tensor) or not given.ndim:
        raise InputError(f"{name} is a tensor with at least one axis.{instead}")
    if not torch.isfinite(given).all():
        raise InputError(f"The {name} has values that are not finite.")


def fitted(given: torch.Tensor, name: str, value: torch.Tensor, site: Site, row: Row) -> torch.Tensor:
    """Return a tensor of one sample as the rows of an activation have it, ``(rows, ...)``.

    Raises:
        ShapeError: it does not broadcast to a sample; both shapes are named.
    """
    try:
        return given.to(value.device, value.dtype).expand(value.shape)
    except RuntimeError:
        raise ShapeError(
            f"At {site}, step {row.step}, the {name} is {describe(given)} and a sample's value "
            f"{describe(value[0])}. Give what broadcasts to that."
        ) from None
