"""A pipeline with some of its components spread over the ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import InputError, LoadError, UnknownNameError, nearest
from workbench.models import loading
from workbench.models.options import check, kept_dtypes, renamed
from workbench.models.parallel import schemes
from workbench.models.parallel.managers import (
    Manager,
    choose_device,
    connect,
    make_manager,
    make_trainable,
)
from workbench.models.parallel.weights import fill
from workbench.models.skeleton import make_part, texts

ParallelScheme = Mapping[str, Mapping[str, Any]]


def open_spread(
    reference: str,
    *,
    parallel_scheme: ParallelScheme | None = None,
    device: torch.device | str | None = None,
    move_to_device: bool = True,
    load_for_training: bool = False,
    components_to_load: Iterable[str] | None = None,
    automodel: Any = None,
    **options: Any,
) -> tuple[Any, dict[str, Manager]]:
    """Open a pipeline with its weights; see `DiffusionModel.from_pretrained`.

    Everything that can be refused is refused before the first weight is read.

    Returns:
        The pipeline, and the manager of each component that is spread.
    """
    asked, found = renamed(options), loading.locate(reference)
    kind = loading.pipeline_class(automodel)
    check(kind, found, asked)
    index = _index(texts(found, asked))
    modules = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    where = choose_device(device)
    chosen = _chosen(components_to_load, modules)
    planned = _planned(parallel_scheme, modules, where)
    sharded = [name for name, (scheme, _) in planned.items() if isinstance(scheme, schemes.FSDP2)]
    if sharded:
        folder = loading.fetched(kind, found, asked)
        made = {}
        for name in sharded:
            module = make_part(folder / name, index[name], buffers=True)
            if not isinstance(module, nn.Module):
                raise InputError(f"{name} is a {type(module).__name__}: there is nothing to shard.")
            dtype = _dtype(asked.get("dtype"), folder, name, asked.get("variant"))
            module = planned[name][1].parallelize(module.to(dtype))
            fill(module, folder / name, dtype=dtype, device=where, variant=asked.get("variant"))
            made[name] = module
        asked = {**asked, **made}
    pipeline = loading.from_pretrained(kind, found, asked)
    return pipeline, _settle(pipeline, planned, where, chosen, move_to_device, load_for_training)


def spread(
    pipeline: Any,
    *,
    parallel_scheme: ParallelScheme | None = None,
    device: torch.device | str | None = None,
    move_to_device: bool = True,
    load_for_training: bool = False,
    components_to_load: Iterable[str] | None = None,
) -> dict[str, Manager]:
    """Spread components of a pipeline that has its weights already; returns their managers."""
    modules = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module)]
    where = choose_device(device)
    chosen = _chosen(components_to_load, modules)
    planned = _planned(parallel_scheme, modules, where)
    for name, (scheme, manager) in planned.items():
        if isinstance(scheme, schemes.FSDP2):
            _replace(pipeline, name, manager.parallelize(pipeline.components[name]))
    return _settle(pipeline, planned, where, chosen, move_to_device, load_for_training)


Planned = dict[str, tuple[schemes.Scheme, Manager]]


def _planned(given: ParallelScheme | None, modules: list[str], device: torch.device) -> Planned:
    """Read and check a scheme, then join the ranks: nothing has been loaded when one entry is refused."""
    read = schemes.read(given or {}, modules)
    if not read:
        return {}
    world = connect(next(iter(read.values())).backend, device)
    for name, scheme in read.items():
        scheme.check(name, world, device)
    return {name: (scheme, make_manager(name, scheme, world, device)) for name, scheme in read.items()}


def _settle(
    pipeline: Any,
    planned: Planned,
    device: torch.device,
    chosen: Iterable[str],
    move_to_device: bool,
    load_for_training: bool,
) -> dict[str, Manager]:
    """Move what is not sharded, make trainable what is to be trained, and wrap what is copied."""
    for name in chosen:
        module = pipeline.components.get(name)
        if not isinstance(module, nn.Module):
            continue
        sharded = isinstance(planned[name][0], schemes.FSDP2) if name in planned else False
        if move_to_device and not sharded:
            module.to(device)
        if load_for_training:
            make_trainable(module)
    for name, (scheme, manager) in planned.items():
        if isinstance(scheme, schemes.DDP):
            _replace(pipeline, name, manager.parallelize(pipeline.components[name]))
    return {name: manager for name, (_, manager) in planned.items()}


def _replace(pipeline: Any, name: str, module: nn.Module) -> None:
    if name in vars(pipeline).get("components", {}):
        pipeline.components[name] = module
    else:
        setattr(pipeline, name, module)


def _chosen(names: Iterable[str] | None, modules: list[str]) -> list[str]:
    if names is None:
        return modules
    for name in names:
        if name not in modules:
            raise UnknownNameError(f"components_to_load names {name!r}.{nearest(name, modules)}")
    return list(names)


def _index(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder} cannot be read as a pipeline: {error}") from error
    return found


def _dtype(given: Any, folder: Path, name: str, variant: str | None) -> torch.dtype:
    if given == "auto":
        kept = kept_dtypes(folder, variant)
        return kept.get(name, kept["default"])
    if isinstance(given, Mapping):
        given = given.get(name, given.get("default"))
    return torch.float32 if given is None else loading.dtype_of(given)
