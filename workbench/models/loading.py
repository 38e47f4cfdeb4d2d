"""From a reference to a pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from workbench import zoo
from workbench.errors import InputError, LoadError, UnknownNameError, WorkbenchError, nearest
from workbench.models import options
from workbench.models.quiet import quiet_load


def load(reference: Any, *, automodel: Any = None, **asked: Any) -> tuple[Any, str]:
    """Open a diffusion pipeline.

    Args:
        reference: a zoo name (``shapes-unet``), a folder, a Hub id (``owner/name``), or a live
            ``DiffusionPipeline``, which is used as it is.
        automodel: the class to open it with, or its name in diffusers; None is ``DiffusionPipeline``.
        **asked: options of ``from_pretrained``, by name; see `workbench.models.options`.

    Returns:
        The pipeline, and the reference as text (empty for a live pipeline).

    Raises:
        LoadError: a folder that holds no pipeline, or one that diffusers cannot open.
        UnknownNameError: neither a zoo name, a folder nor a Hub id.
        InputError: something else altogether.
    """
    if isinstance(reference, (str, Path)):
        with quiet_load() if reference in zoo.models() else nullcontext():
            return from_pretrained(pipeline_class(automodel), locate(str(reference)), asked), str(reference)
    if callable(reference) and hasattr(reference, "components"):
        if asked:
            raise InputError(f"A live pipeline is used as it is; {', '.join(asked)} cannot change it.")
        return reference, ""
    raise InputError(
        f"{type(reference).__name__} is not a model. Give a zoo name ({', '.join(zoo.models())}), a folder, "
        "a Hub id such as 'owner/name', or a DiffusionPipeline."
    )


def locate(reference: str) -> str:
    """Return what ``from_pretrained`` should open: a folder or a Hub id."""
    if reference in zoo.models():
        return str(zoo.path(reference))
    named = bool(reference.strip())
    path = Path(reference).expanduser()
    if named and path.is_dir():
        _check_folder(path)
        return str(path)
    if named and path.exists():
        raise LoadError(f"{path} is a file; give the folder of a pipeline, the one with model_index.json.")
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
        return reference
    raise UnknownNameError(
        f"No model {reference!r}: no zoo model, no folder, no Hub id (owner/name) is called that."
        f"{nearest(reference, zoo.models())}"
    )


def _check_folder(path: Path) -> None:
    index = path / "model_index.json"
    if not index.is_file():
        inside = ", ".join(sorted(item.name for item in path.iterdir())[:6]) or "nothing"
        raise LoadError(f"{path} is no pipeline: it has no model_index.json, only {inside}.")
    try:
        named = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise LoadError(f"{index} cannot be read: {error}") from error
    if not isinstance(named, dict) or "_class_name" not in named:
        raise LoadError(f"{index} names no pipeline class (_class_name).")


def pipeline_class(automodel: Any) -> Any:
    """Return the class that opens a pipeline.

    Args:
        automodel: a class with ``from_pretrained``, its name in diffusers, or None for
            ``DiffusionPipeline``, which opens a folder as the class that it names.

    Raises:
        UnknownNameError: diffusers has no such class.
        InputError: something that cannot open a pipeline.
    """
    import diffusers

    if automodel is None:
        return diffusers.DiffusionPipeline
    found = automodel
    if isinstance(automodel, str):
        found = getattr(diffusers, automodel, None) if automodel in dir(diffusers) else None
        if found is None:
            known = [name for name in dir(diffusers) if "Pipeline" in name]
            raise UnknownNameError(f"diffusers has no pipeline {automodel!r}.{nearest(automodel, known)}")
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise InputError(
            f"automodel={automodel!r} opens no pipeline. Give a pipeline class of diffusers, or its name."
        )
    return found


def dtype_of(given: torch.dtype | str) -> torch.dtype:
    """Return a floating dtype of torch, given as it is or by its name.

    Raises:
        UnknownNameError: torch has no such dtype.
        InputError: it is not a floating one, or no dtype at all.
    """
    known = [name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)]
    if isinstance(given, str):
        name = given.removeprefix("torch.")
        if name not in known:
            raise UnknownNameError(f"torch has no dtype {given!r}.{nearest(name, known)}")
        given = getattr(torch, name)
    if not isinstance(given, torch.dtype) or not given.is_floating_point:
        raise InputError(f"{given!r} is no dtype for weights. Give torch.bfloat16 or 'float16', say.")
    return given


def fetched(kind: Any, found: str, asked: Mapping[str, Any]) -> Path:
    """Return the folder of a pipeline; one on the Hub is downloaded, or found where it was before.

    Args:
        kind: the pipeline class.
        found: what `locate` returned.
        asked: options of ``from_pretrained``.
    """
    if Path(found).is_dir():
        return Path(found)
    known = ("variant", "use_safetensors", "custom_pipeline", "trust_remote_code")
    others = {name: asked[name] for name in known if name in asked}
    fetch = getattr(kind, "download", None) or pipeline_class(None).download
    return Path(fetch(found, **options.asked_of_hub(asked), **others))


def from_pretrained(kind: Any, folder: str, asked: Mapping[str, Any]) -> Any:
    """Open a pipeline with its weights, with every check of its options.

    Args:
        kind: the pipeline class.
        folder: what `locate` returned.
        asked: options of ``from_pretrained``.

    Raises:
        LoadError: it cannot be opened.
        UnknownNameError, InputError: options that do not fit.
    """
    asked = {"use_safetensors": True, **options.renamed(asked)}
    try:
        options.check(kind, folder, asked)
        if asked.get("dtype") == "auto":
            folder = str(fetched(kind, folder, asked))
            asked["dtype"] = options.kept_dtypes(Path(folder), asked.get("variant"))
        elif isinstance(asked.get("dtype"), Mapping):
            asked["dtype"] = {name: dtype_of(each) for name, each in asked["dtype"].items()}
        elif asked.get("dtype") is not None:
            asked["dtype"] = dtype_of(asked["dtype"])
        return _named(kind, folder, asked).from_pretrained(folder, **asked)
    except WorkbenchError:
        raise
    except (OSError, ValueError, AttributeError, TypeError, ImportError, RuntimeError, KeyError) as error:
        raise LoadError(
            f"{folder} could not be opened as a pipeline: {error}{_pickled(folder, asked)}"
        ) from error


def _named(kind: Any, folder: str, asked: Mapping[str, Any]) -> Any:
    """Return the class that a folder names, where parts are given by name and it is one of diffusers.

    ``DiffusionPipeline`` itself does not know which parts of that class are optional, and would load those
    from the folder in place of what is given.
    """
    import diffusers

    if kind is not diffusers.DiffusionPipeline or "custom_pipeline" in asked:
        return kind
    index = options.index_of(folder, asked)
    named, given = index.get("_class_name"), any(isinstance(index.get(name), list) for name in asked)
    return getattr(diffusers, named, kind) if given and isinstance(named, str) else kind


def _pickled(folder: str, asked: Mapping[str, Any]) -> str:
    """Say what to do where the weights are there as pickles only."""
    files = sorted(Path(folder).glob("*/*.bin")) if asked["use_safetensors"] else []
    if not files or any(files[0].parent.glob("*.safetensors")):
        return ""
    return (
        f"\n{files[0].parent.name} has its weights as a pickle, which can run code when it is loaded. If you "
        "trust it, say so: use_safetensors=False."
    )
