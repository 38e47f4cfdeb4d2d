"""From a reference to a pipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from torch import nn

from workbench import zoo
from workbench.errors import InputError, LoadError, UnknownNameError, WorkbenchError, nearest
from workbench.models import options
from workbench.models.folder import (
    INDEX,
    check_parts,
    kept_dtypes,
    lacking,
    misshapen,
    named_classes,
    part_classes,
    pickled,
    read_index,
    torn_pickle,
)
from workbench.models.quiet import quiet_load


def load(reference: Any, *, automodel: Any = None, whole: bool = True, **asked: Any) -> tuple[Any, str]:
    """Open a diffusion pipeline.

    Args:
        reference: a zoo name (``shapes-unet``), a folder, a Hub id (``owner/name``), or a live
            ``DiffusionPipeline``, which is used as it is.
        automodel: the class to open it with, or its name in diffusers; None is ``DiffusionPipeline``.
        whole: refuse files that lack some of the weights.
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
            pipeline = from_pretrained(pipeline_class(automodel), locate(str(reference)), asked, whole=whole)
            return pipeline, str(reference)
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
    try:
        path = Path(reference).expanduser()
        named = named and path.exists()
    except (ValueError, RuntimeError) as error:  # a null character; the home of nobody
        raise UnknownNameError(f"No model {reference!r}: {error}") from error
    if named and path.is_dir():
        read_index(path)
        return str(path)
    if named:
        raise LoadError(f"{path} is a file; give the folder of a pipeline, the one with model_index.json.")
    if reference.count("/") == 1 and not reference.startswith((".", "/", "~")):
        return reference
    raise UnknownNameError(
        f"No model {reference!r}: no zoo model, no folder, no Hub id (owner/name) is called that."
        f"{nearest(reference, zoo.models())}"
    )


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


def dtypes_of(
    given: Any, folder: Path, parts: Collection[str], variant: str | None
) -> Mapping[str, torch.dtype | None]:
    """Return in which dtype each part's weights are loaded, with ``default`` for those that are not named.

    Args:
        given: a dtype or its name; of each part its own; ``"auto"`` for that of the files; None leaves it to
            each part's library.
        folder: the pipeline's.
        parts: the names that there are.
        variant: of the files.

    Raises:
        UnknownNameError: torch has no such dtype, or the pipeline no such part.
        InputError: no floating dtype.
    """
    if given is None:
        return {"default": None}
    if given == "auto":
        return kept_dtypes(folder, variant)
    if not isinstance(given, Mapping):
        return {"default": dtype_of(given)}
    found = {}
    for name, each in given.items():
        known = [*(each for each in parts if not each.startswith("_")), "default"]
        if name not in known:
            raise UnknownNameError(f"dtype: {folder} has no component {name!r}.{nearest(str(name), known)}")
        try:
            found[name] = dtype_of(each)
        except WorkbenchError as error:
            raise type(error)(f"dtype of {name}: {error}") from None
    return {"default": torch.float32, **found}


def opened_class(folder: Path, index: Mapping[str, Any], kind: Any) -> Any:
    """Return the pipeline class that a folder is opened as.

    Args:
        folder: the pipeline's.
        index: as `read_index` returns it.
        kind: what `pipeline_class` returned; if that chooses another, the index says which.

    Raises:
        LoadError, UnknownNameError, InputError: the index names no pipeline of diffusers.
    """
    base = pipeline_class(None)
    if kind is not base and not options.chooses(kind):
        return kind
    named = index["_class_name"]
    try:
        found = pipeline_class(named if isinstance(named, str) else repr(named))
    except WorkbenchError as error:
        raise type(error)(f"{folder / INDEX}: {error}") from None
    if not issubclass(found, base):
        raise LoadError(f"{folder / INDEX} names {named}, which is no pipeline.")
    return found


def fetched(kind: Any, found: str, asked: Mapping[str, Any]) -> Path:
    """Return the folder of a pipeline; one on the Hub is downloaded, or found where it was before.

    Args:
        kind: the pipeline class.
        found: what `locate` returned.
        asked: options of ``from_pretrained``.

    Raises:
        LoadError: it cannot be fetched.
    """
    if Path(found).is_dir():
        return Path(found)
    fetch = getattr(kind, "download", None) or pipeline_class(None).download
    try:
        folder = Path(fetch(found, **asked))
        if asked.get("force_download"):
            # diffusers itself takes weights that are in the cache all the same.
            there = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            snapshot_download(found, allow_patterns=there, **options.asked_of_hub(asked))
        return folder
    except Exception as error:
        raise LoadError(options.unfetched(found, asked, error, _lack(kind, found, asked))) from error


def _lack(kind: Any, found: str, asked: Mapping[str, Any]) -> str:
    """Say which parts of a repository the Hub's cache lacks, if it has the index."""
    index = try_to_load_from_cache(found, INDEX, asked.get("cache_dir"), asked.get("revision"))
    if not isinstance(index, str):
        return ""
    folder, lost = Path(index).parent, []
    try:
        for name, cls in _classes(kind, folder, asked).items():
            try:
                _check(folder, {name: cls}, asked)
            except LoadError:
                lost.append(name)
    except WorkbenchError:
        return ""
    return options.lacking_of(folder, lost)


def check_folder(kind: Any, folder: Path, asked: Mapping[str, Any]) -> tuple[str, ...]:
    """Refuse a folder of which something is missing, before any of its weights is read.

    Args:
        kind: the pipeline class.
        folder: the pipeline's.
        asked: options of ``from_pretrained``, with the parts that are given.

    Returns:
        The names of the parts that are not given.

    Raises:
        LoadError: with the part and its file.
        UnknownNameError, InputError: the folder names no pipeline of diffusers.
    """
    classes = _classes(kind, folder, asked)
    _check(folder, classes, asked)
    return tuple(classes)


def _classes(kind: Any, folder: Path, asked: Mapping[str, Any]) -> dict[str, Any]:
    index = read_index(folder)
    return part_classes(folder, index, opened_class(folder, index, kind), given=asked)


def _check(folder: Path, classes: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    others = not asked.get("use_safetensors", True) or bool(asked.get("use_flashpack"))
    check_parts(folder, classes, variant=asked.get("variant"), pickled=others)


def from_pretrained(kind: Any, reference: str, asked: Mapping[str, Any], *, whole: bool = True) -> Any:
    """Open a pipeline with its weights, with every check of its options.

    Args:
        kind: the pipeline class.
        reference: what `locate` returned.
        asked: options of ``from_pretrained``.
        whole: refuse files that lack some of the weights.

    Raises:
        LoadError: it cannot be opened.
        UnknownNameError, InputError: options that do not fit.
    """
    asked = options.renamed(asked)
    if asked.get("use_safetensors") is None:
        asked["use_safetensors"] = True
    options.check(kind, reference, asked)
    folder = fetched(kind, reference, asked)
    index = read_index(folder)
    if asked.get("trust_remote_code"):
        # Code that comes with a folder can make anything of its parts, but not without their weights.
        known = tuple(name for name in named_classes(folder, index) if name not in asked)
    else:
        known = check_folder(kind, folder, asked)
    if asked.get("dtype") is not None:
        asked["dtype"] = dtypes_of(asked["dtype"], folder, index, asked.get("variant"))
    if asked["use_safetensors"] is False and not pickled(folder, _modules(folder, index, known)):
        # With False diffusers wants every part pickled; with None it takes what there is.
        asked["use_safetensors"] = None
    try:
        pipeline = _named(kind, index, asked).from_pretrained(str(folder), **asked)
    except Exception as error:
        why = _fault(folder, index, known, asked.get("variant")) or error
        raise LoadError(f"{folder} could not be opened as a pipeline: {why}") from error
    if whole:
        _check_weights(pipeline, folder, known, elsewhere=asked.get("device_map") is not None)
    return pipeline


def _modules(folder: Path, index: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """Return those of a folder's parts that have weights."""
    classes = named_classes(folder, index)
    return [
        name for name in names if isinstance(classes.get(name), type) and issubclass(classes[name], nn.Module)
    ]


def _fault(folder: Path, index: Mapping[str, Any], names: Collection[str], variant: str | None) -> str:
    """Say which part's weights are torn or do not fit its configuration, where the libraries say no part."""
    from workbench.models.skeleton import from_folder

    for name in _modules(folder, index, names):
        torn = torn_pickle(folder, name)
        if torn:
            return torn
        kind = named_classes(folder, index)[name]
        if hasattr(kind, "load_config"):
            with suppress(Exception), torch.device("meta"):
                found = misshapen(folder, name, from_folder(kind, folder / name, None), variant)
                if found:
                    return found
    return ""


def _check_weights(pipeline: Any, folder: Path, names: Collection[str], *, elsewhere: bool) -> None:
    """Refuse weights that the files lack: diffusers leaves them out, and transformers makes some up."""
    for name in names:
        part = getattr(pipeline, name, None)
        lost = lacking(part, elsewhere=elsewhere) if isinstance(part, nn.Module) else []
        if lost:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            raise LoadError(
                f"{folder / name} lacks weights of {name}: {', '.join(lost[:3])}{more}. Copy or download it "
                "again."
            )


def _named(kind: Any, index: Mapping[str, Any], asked: Mapping[str, Any]) -> Any:
    """Return the class that a folder names, where parts are given by name and it is one of diffusers.

    ``DiffusionPipeline`` itself does not know which parts of that class are optional, and would load those
    from the folder in place of what is given.
    """
    import diffusers

    if kind is not diffusers.DiffusionPipeline or "custom_pipeline" in asked:
        return kind
    named, given = index.get("_class_name"), any(isinstance(index.get(name), list) for name in asked)
    return getattr(diffusers, named, kind) if given and isinstance(named, str) else kind
