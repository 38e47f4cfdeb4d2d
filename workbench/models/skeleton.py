"""A pipeline's parts without its weights: modules on torch's ``meta`` device, all else as it is."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from workbench.errors import LoadError, WorkbenchError
from workbench.models.loading import locate, pipeline_class
from workbench.models.options import asked_of_hub, check

_LIBRARIES = ("diffusers", "transformers")
_TEXTS = ["*.json", "*.txt", "*.model", "*.py"]


class Skeleton:
    """What a folder or a Hub repository says of its pipeline.

    Args:
        reference: a zoo name, a folder or a Hub id; of a Hub id, no weights are downloaded.
        automodel: the pipeline class, its name in diffusers, or None for the one that is named.
        **options: of ``from_pretrained``, under today's names; those of what is fetched count here, and parts
            given by name.

    Attributes:
        components: the parts by name; modules have shapes and no values.
        automodel: the pipeline class.

    Raises:
        LoadError, UnknownNameError: it is no pipeline, or a part's class is not known.
    """

    def __init__(self, reference: str, *, automodel: Any = None, **options: Any) -> None:
        folder = texts(locate(reference), options)
        check(pipeline_class(automodel), str(folder), options)
        index = json.loads((folder / "model_index.json").read_text())
        try:
            self.automodel: type = pipeline_class(automodel or index["_class_name"])
        except WorkbenchError as error:
            raise type(error)(f"{folder}: {error}") from None
        taken = inspect.signature(self.automodel).parameters
        parts = {
            name: options[name] if name in options else _part(folder / name, entry)
            for name, entry in index.items()
            if name in taken
        }
        try:
            self.components: dict[str, Any] = self.automodel(**parts).components
        except (TypeError, ValueError, AttributeError) as error:
            raise LoadError(
                f"{reference} could not be put together as a {self.automodel.__name__}: {error}"
            ) from error


def texts(found: str, options: dict[str, Any]) -> Path:
    """Return the folder of a pipeline's configurations."""
    if Path(found).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(found, allow_patterns=_TEXTS, **asked_of_hub(options)))
    except (OSError, ValueError) as error:
        raise LoadError(f"{found} could not be looked up: {error}") from error


def part_class(name: str, entry: Any) -> Any:
    """Return a part's class, as ``[library, class]`` of the index says; None for a plain setting or no part.

    Raises:
        LoadError: it cannot be imported.
    """
    if not isinstance(entry, list) or entry[1] is None:
        return None
    library, called = entry
    home = getattr(diffusers.pipelines, library, None)
    try:
        # Any other library is code that a folder names and nobody asked to run.
        return getattr(importlib.import_module(library) if library in _LIBRARIES else home, called)
    except (ImportError, AttributeError) as error:
        raise LoadError(f"{name} is a {library}.{called}, which cannot be imported: {error}") from error


def _part(folder: Path, entry: Any) -> Any:
    """Make one part: a module on ``meta`` from its configuration, anything else as it is kept."""
    if not isinstance(entry, list):
        return entry
    cls = part_class(folder.name, entry)
    if cls is None:
        return None
    try:
        if not issubclass(cls, nn.Module):
            return cls.from_pretrained(folder)
        with torch.device("meta"):
            return from_folder(cls, folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LoadError(f"{folder.name} could not be built from {folder}: {error}") from error


def from_folder(cls: Any, folder: Path) -> nn.Module:
    """Build a module as its configuration in a folder says, without its weights."""
    if hasattr(cls, "load_config"):
        module: nn.Module = cls.from_config(cls.load_config(folder))
    else:
        module = cls(cls.config_class.from_pretrained(folder))
    return module.eval()
