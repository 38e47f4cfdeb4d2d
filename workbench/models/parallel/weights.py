"""A component's weights, read into its shards: no rank ever holds all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from workbench.errors import LoadError
from workbench.models.options import weight_files


def fill(
    module: nn.Module, folder: Path, *, dtype: torch.dtype, device: torch.device, variant: str | None = None
) -> None:
    """Give a module on ``meta`` its weights, one tensor at a time.

    Args:
        module: with parameters on ``meta``, sharded or not, and real buffers.
        folder: the component's, with its safetensors files.
        dtype: what the floating-point weights become.
        device: where they go.
        variant: of the files.

    Raises:
        LoadError: the files lack a weight, have another shape, or cannot be read.
    """
    where = _where(folder, variant)
    made: dict[nn.Parameter, nn.Parameter] = {}
    for path, owner in module.named_modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in made:
                tensor = _read(where, f"{path}.{name}".lstrip("."), parameter.shape, folder)
                made[parameter] = _placed(tensor, parameter, dtype, device)
            owner._parameters[name] = made[parameter]
        for name, buffer in list(owner._buffers.items()):
            if buffer is None:
                continue
            key = f"{path}.{name}".lstrip(".")
            kept = _read(where, key, buffer.shape, folder) if key in where else buffer
            owner._buffers[name] = kept.to(device, dtype if kept.is_floating_point() else kept.dtype)


def _where(folder: Path, variant: str | None) -> dict[str, Path]:
    found = {}
    for file in weight_files(folder, variant):
        try:
            with safe_open(file, framework="pt") as weights:
                found.update(dict.fromkeys(weights.keys(), file))
        except (OSError, SafetensorError) as error:
            raise LoadError(f"{file} cannot be read: {error}") from error
    if not found:
        raise LoadError(f"{folder} has no safetensors files, from which alone shards can be read.")
    return found


def _read(where: Mapping[str, Path], key: str, shape: torch.Size, folder: Path) -> torch.Tensor:
    if key not in where:
        raise LoadError(f"{folder} lacks the weight {key}.")
    with safe_open(where[key], framework="pt") as weights:
        tensor: torch.Tensor = weights.get_tensor(key)
    if tensor.shape != shape:
        raise LoadError(f"{folder}: {key} is {tuple(tensor.shape)}, not {tuple(shape)}.")
    return tensor


def _placed(tensor: torch.Tensor, like: Any, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    """Return this rank's part of a tensor as a parameter that lies as ``like`` does."""
    if not isinstance(like, DTensor):
        return nn.Parameter(tensor.to(device, dtype, copy=True), requires_grad=like.requires_grad)
    mesh, placements = like.device_mesh, like.placements
    local = distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
    whole = DTensor.from_local(
        local.to(device, dtype, copy=True),
        mesh,
        placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return nn.Parameter(whole, requires_grad=like.requires_grad)
