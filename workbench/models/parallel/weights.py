"""A component's weights, read into its shards: no rank ever holds all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from workbench.errors import LoadError
from workbench.models.folder import reading, weight_files
from workbench.models.skeleton import from_folder


def unfilled(kind: Any, folder: Path, dtype: torch.dtype | None, *, uniform: bool) -> nn.Module:
    """Build a model whose parameters are on ``meta``, in the dtypes that loading it would give.

    Args:
        kind: its class, of diffusers or transformers.
        folder: with its configuration.
        dtype: of its parameters; buffers that it computes itself are real, and as the class makes them.
        uniform: cast also what the class would keep in float32, which training in shards needs.

    Raises:
        LoadError: the configuration is not there, or does not fit the class.
    """
    try:
        with init_empty_weights(include_buffers=False):
            return from_folder(kind, folder, dtype, uniform=uniform)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{folder.name} could not be built from {folder}: {error}") from error


def fill(module: nn.Module, folder: Path, *, device: torch.device, variant: str | None = None) -> None:
    """Give a module on ``meta`` its weights, one tensor at a time.

    Args:
        module: with parameters on ``meta``, sharded or not, and real buffers.
        folder: the component's, with its safetensors files.
        device: where the weights go; a module that keeps its shards on the CPU has its buffers there too.
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
                made[parameter] = placed(tensor, parameter, device)
            owner._parameters[name] = made[parameter]
        for name, buffer in list(owner._buffers.items()):
            if buffer is None:
                continue
            key = f"{path}.{name}".lstrip(".")
            kept = _read(where, key, buffer.shape, folder).to(buffer.dtype) if key in where else buffer
            owner._buffers[name] = kept.to(device)


def has_all(module: nn.Module, folder: Path, variant: str | None = None) -> bool:
    """Whether a component's files have every one of its parameters under its own name."""
    return {name for name, _ in module.named_parameters()} <= _where(folder, variant).keys()


def _where(folder: Path, variant: str | None) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in weight_files(folder, variant):
        with reading(file) as weights:
            found.update(dict.fromkeys(weights.keys(), file))
    if not found:
        raise LoadError(f"{folder} has no safetensors files, from which alone shards can be read.")
    return found


def _read(where: Mapping[str, Path], key: str, shape: torch.Size, folder: Path) -> torch.Tensor:
    if key not in where:
        raise LoadError(f"{folder} lacks the weight {key}.")
    with reading(where[key]) as weights:
        tensor: torch.Tensor = weights.get_tensor(key)
    if tensor.shape != shape:
        raise LoadError(f"{folder}: {key} is {tuple(tensor.shape)}, not {tuple(shape)}.")
    return tensor


def placed(tensor: torch.Tensor, like: Any, device: torch.device) -> nn.Parameter:
    """Return this rank's part of a tensor as a parameter that lies as ``like`` does."""
    if not isinstance(like, DTensor):
        return nn.Parameter(tensor.to(device, like.dtype, copy=True), requires_grad=like.requires_grad)
    mesh, placements = like.device_mesh, like.placements
    local = distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
    whole = DTensor.from_local(
        local.to(device, like.dtype, copy=True),
        mesh,
        placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
    return nn.Parameter(whole, requires_grad=like.requires_grad)
