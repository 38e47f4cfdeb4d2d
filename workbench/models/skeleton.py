"""A pipeline's parts without its weights: modules on torch's ``meta`` device, all else as it is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from workbench.errors import InputError, LoadError
from workbench.models.folder import (
    INDEX,
    kept_dtype,
    kept_dtypes_on_hub,
    part_classes,
    part_folder,
    read_index,
)
from workbench.models.loading import dtypes_of, locate, opened_class, pipeline_class
from workbench.models.options import brings_code, check, texts


class Skeleton:
    """What a folder or a Hub repository says of its pipeline.

    Args:
        reference: a zoo name, a folder or a Hub id; of a Hub id, no weights are downloaded.
        automodel: the pipeline class, its name in diffusers, or None for the one that is named.
        **options: of ``from_pretrained``, under today's names; those of what is fetched count here, the
            dtype, and parts given by name.

    Attributes:
        components: the parts by name; modules have shapes, the dtypes that loading would give, and no values.
        automodel: the pipeline class.

    Raises:
        LoadError, UnknownNameError: it is no pipeline, or a part's class is not known.
        InputError: a dtype that weights cannot have, or code that is not diffusers'.
    """

    def __init__(self, reference: str, *, automodel: Any = None, **options: Any) -> None:
        found, kind = locate(reference), pipeline_class(automodel)
        folder = texts(found, options)
        check(kind, str(folder), options)
        index = read_index(folder)
        if options.get("custom_pipeline") is not None or brings_code(folder, index):
            raise InputError(
                f"dispatch=False reads configurations only, and code of {reference}'s own can make anything "
                "of them. Leave dispatch=False out."
            )
        self.automodel: type = opened_class(folder, index, kind)
        classes = part_classes(folder, index, self.automodel, given=options)
        dtypes = _kept_on_hub(found, options) or dtypes_of(
            options.get("dtype"), folder, index, options.get("variant")
        )
        taken = inspect.signature(self.automodel).parameters
        parts = {name: None if isinstance(entry, list) else entry for name, entry in index.items()}
        for name, cls in classes.items():
            trusted = bool(options.get("trust_remote_code"))
            parts[name] = _part(folder, name, cls, dtypes.get(name, dtypes["default"]), trusted)
        parts |= options
        try:
            self.components: dict[str, Any] = self.automodel(
                **{name: part for name, part in parts.items() if name in taken}
            ).components
        except (TypeError, ValueError, AttributeError) as error:
            raise LoadError(
                f"{folder} could not be put together as a {self.automodel.__name__}: {error}"
            ) from error


def _kept_on_hub(found: str, options: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """Return the dtypes of weights that are on the Hub, where they are asked for and it can be."""
    if options.get("dtype") != "auto" or Path(found).is_dir():
        return {}
    hub = {name: options[name] for name in ("revision", "token") if name in options}
    try:
        return kept_dtypes_on_hub(found, options.get("variant"), **hub)
    except Exception:  # noqa: BLE001 - without a network, what is in the cache is looked at
        return {}


def _part(folder: Path, name: str, cls: Any, dtype: torch.dtype | None, trusted: bool) -> Any:
    """Make one part: a module on ``meta`` from its configuration, anything else as it is kept.

    A class of transformers that chooses another is told whether code beside the files may run: left to itself
    it would ask.
    """
    if cls is None:
        raise LoadError(
            f"{folder / INDEX}: {name} is of no class of diffusers or transformers. If you trust the code "
            "that it names, say so: trust_remote_code=True."
        )
    where = part_folder(folder, name, cls)
    try:
        chooses = cls.__module__.startswith("transformers.models.auto.")
        if hasattr(cls, "_model_mapping") and chooses:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trusted)
            cls = cls._model_mapping[type(config)]
        if not issubclass(cls, nn.Module):
            return cls.from_pretrained(where, **({"trust_remote_code": trusted} if chooses else {}))
        with torch.device("meta"):
            return from_folder(cls, where, dtype)
    except Exception as error:
        raise LoadError(f"{name} could not be built from {where}: {error}") from error


def from_folder(cls: Any, folder: Path, dtype: torch.dtype | None, *, uniform: bool = False) -> nn.Module:
    """Build a module as its configuration in a folder says, without its weights.

    Args:
        cls: its class, of diffusers or transformers.
        folder: with its configuration.
        dtype: what its weights are to be loaded in; None is float32 in diffusers, and in transformers what
            the configuration says, or the files.
        uniform: cast also what the class would keep in float32.
    """
    of_diffusers = hasattr(cls, "load_config")
    config = cls.load_config(folder) if of_diffusers else cls.config_class.from_pretrained(folder)
    if dtype is None and not of_diffusers:
        dtype = config.dtype or kept_dtype(folder)
    dtype = dtype or torch.float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        module: nn.Module = cls.from_config(config) if of_diffusers else cls(config)
    finally:
        torch.set_default_dtype(before)
    kept = set() if uniform else _in_float32(module, dtype)
    for path, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept & {*path.split(".")} else dtype)
    return module.eval()


def _in_float32(module: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the names of modules whose weights the class keeps in float32 when it is loaded in a dtype."""
    names = {*(getattr(module, "_keep_in_fp32_modules", None) or ())}
    if hasattr(module, "load_config"):
        return names
    # transformers keeps those in float32 only in place of float16, and others in place of both.
    strictly = {*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())}
    return {torch.float16: names | strictly, torch.bfloat16: strictly}.get(dtype, set())
