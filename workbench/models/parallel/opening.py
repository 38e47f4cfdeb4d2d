"""A pipeline with some of its components spread over the ranks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.models import loading
from workbench.models.folder import part_classes, part_folder, read_index
from workbench.models.options import check, renamed, texts
from workbench.models.parallel import schemes
from workbench.models.parallel.drawing import draw
from workbench.models.parallel.managers import (
    FSDP2Manager,
    Manager,
    check_trainable,
    choose_device,
    connect,
    make_manager,
    make_trainable,
    ranks,
)
from workbench.models.parallel.weights import fill, has_all, unfilled
from workbench.models.spec import PipelineSpec, build

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
    whole: bool = True,
    **options: Any,
) -> tuple[Any, dict[str, Manager]]:
    """Open a pipeline with its weights; see `DiffusionModel.from_pretrained` and `loading.load`.

    Everything that can be refused is refused before the first weight is read.

    Returns:
        The pipeline, and the manager of each component that is spread.
    """
    asked, found = renamed(options), loading.locate(reference)
    kind = loading.pipeline_class(automodel)
    check(kind, found, asked)
    classes = _classes(texts(found, asked), kind, asked)
    modules = [name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, nn.Module)]
    where, chosen = choose_device(device), _chosen(components_to_load, modules)
    planned = _planned(parallel_scheme, modules, where)
    _check_quantised(asked, planned)
    for name, (scheme, _) in planned.items():
        if (
            isinstance(scheme, schemes.DDP)
            and isinstance(asked.get(name), nn.Module)
            and not load_for_training
        ):
            check_trainable(asked[name])
    made = _read_in_shards(
        kind, found, asked, classes, planned, where, trained=chosen if load_for_training else ()
    )
    pipeline = loading.from_pretrained(kind, found, {**asked, **made}, whole=whole)
    _shard(pipeline, {name: each for name, each in planned.items() if name not in made})
    return pipeline, _settle(pipeline, planned, where, chosen, move_to_device, load_for_training)


def build_spread(
    reference: str | Path,
    spec: PipelineSpec,
    *,
    dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    parallel_scheme: ParallelScheme | None = None,
    device: torch.device | str | None = None,
    move_to_device: bool = True,
    load_for_training: bool = False,
    components_to_load: Iterable[str] | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Manager]]:
    """Build a denoiser with random weights; see `DiffusionModel.from_config`.

    What can be refused is refused before anything is built.

    Returns:
        The pipeline, and the manager of each component that is spread.
    """
    spec.validate_for_from_config()
    found, asked, modules = str(reference), renamed(options), [spec.subfolder]
    classes: dict[str, Any] = {}
    kind = loading.pipeline_class(spec.pipeline_cls or None)
    if spec.load_full_pipeline:
        found = loading.locate(found)
        classes = _classes(texts(found, asked), kind, asked)
        modules += [
            name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, nn.Module)
        ]
    where, chosen = choose_device(device), _chosen(components_to_load, modules)
    planned = _planned(parallel_scheme, modules, where)
    others = {name: each for name, each in planned.items() if name != spec.subfolder}
    _check_quantised(asked, others)
    made = {}
    if others:
        given = {**asked, spec.subfolder: None, "dtype": torch.float32 if dtype is None else dtype}
        trained = chosen if load_for_training else ()
        made = _read_in_shards(kind, found, given, classes, others, where, trained=trained)
    through: Callable[[Callable[[], nn.Module]], nn.Module] = operator.call
    scheme, manager = planned.get(spec.subfolder, (None, None))
    if isinstance(scheme, schemes.FSDP2):
        assert isinstance(manager, FSDP2Manager)
        through = partial(draw, manager=manager, device=scheme.keeps_on(where))
    pipeline = build(reference, spec, dtype=dtype, seed=seed, through=through, **options, **made)
    _shard(pipeline, {name: each for name, each in others.items() if name not in made})
    return pipeline, _settle(pipeline, planned, where, chosen, move_to_device, load_for_training)


Planned = dict[str, tuple[schemes.Scheme, Manager]]


def _read_in_shards(
    kind: Any,
    found: str,
    asked: Mapping[str, Any],
    classes: Mapping[str, Any],
    planned: Planned,
    device: torch.device,
    *,
    trained: Collection[str],
) -> dict[str, nn.Module]:
    """Make the components that are sharded and not given, each rank reading its share of their weights."""
    made = {}
    folder = loading.fetched(kind, found, asked)
    loading.check_folder(kind, folder, asked)
    dtypes = loading.dtypes_of(asked.get("dtype"), folder, read_index(folder), asked.get("variant"))
    for name, (scheme, manager) in planned.items():
        if not isinstance(scheme, schemes.FSDP2) or name in asked:
            continue
        part, dtype = part_folder(folder, name, classes[name]), dtypes.get(name, dtypes["default"])
        module = unfilled(classes[name], part, dtype, uniform=name in trained)
        if not hasattr(classes[name], "load_config") and not has_all(module, part, asked.get("variant")):
            # Files whose names transformers changes as it reads them it loads by itself, and whole.
            continue
        made[name] = manager.parallelize(module)
        fill(module, part, device=scheme.keeps_on(device), variant=asked.get("variant"))
    return made


def _shard(pipeline: Any, planned: Planned) -> None:
    """Shard components that have their weights already."""
    for name, (scheme, manager) in planned.items():
        if isinstance(scheme, schemes.FSDP2):
            _replace(pipeline, name, manager.parallelize(pipeline.components[name]))


def _check_quantised(asked: Mapping[str, Any], planned: Planned) -> None:
    sharded = [name for name, (scheme, _) in planned.items() if isinstance(scheme, schemes.FSDP2)]
    if sharded and asked.get("quantization_config") is not None:
        raise InputError(
            f"{', '.join(sharded)}: quantised weights cannot be sharded. Leave quantization_config or the "
            "parallel scheme."
        )


def _planned(given: ParallelScheme | None, modules: list[str], device: torch.device) -> Planned:
    """Read and check a scheme, then join the ranks: nothing has been loaded when one entry is refused."""
    read = schemes.read(given or {}, modules)
    if not read:
        return {}
    backends = {scheme.backend for scheme in read.values() if scheme.backend is not None}
    if len(backends) > 1:
        raise InputError(f"All components share one process group; its backend is one of {sorted(backends)}.")
    world = ranks()
    for name, scheme in read.items():
        scheme.check(name, world, device)
    connect(next(iter(backends), None), device)
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
    chosen = modules if names is None else list(names)
    for name in chosen:
        if name not in modules:
            raise UnknownNameError(f"components_to_load names {name!r}.{nearest(name, modules)}")
    return chosen


def _classes(folder: Path, kind: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the class of each part, of the folder or given by name."""
    index = read_index(folder)
    given = {name: type(part) for name, part in asked.items() if isinstance(part, nn.Module)}
    return part_classes(folder, index, loading.opened_class(folder, index, kind), given=asked) | given
