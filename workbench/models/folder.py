"""A pipeline's folder: what its index names, whether each part is there and whole, and in which dtypes."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, TypeVar

import diffusers
import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch import nn

from workbench.errors import LoadError

AnyPath = TypeVar("AnyPath", bound=PurePath)

INDEX = "model_index.json"

_LIBRARIES = ("diffusers", "transformers")
_MEND = "Copy or download it again"


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a pipeline.

    Raises:
        LoadError: it is not there, cut short, or names no pipeline class.
    """
    path = folder / INDEX
    if not path.is_file():
        inside = ", ".join(sorted(item.name for item in folder.iterdir())[:6]) or "nothing"
        raise LoadError(f"{folder} is no pipeline: it has no {INDEX}, only {inside}.")
    index = _read(path)
    if "_class_name" not in index:
        raise LoadError(f"{path} names no pipeline class (_class_name).")
    return index


def part_classes(
    folder: Path, index: Mapping[str, Any], kind: Any, given: Collection[str] = ()
) -> dict[str, Any]:
    """Return the class of each part that a pipeline takes from its folder.

    Args:
        folder: the pipeline's.
        index: as `read_index` returns it.
        kind: the pipeline's class.
        given: the parts that come from elsewhere.

    Returns:
        By name the class, or None for one that neither diffusers nor transformers has: code that a folder
        names and nobody asked to run.

    Raises:
        LoadError: the index names no class for a part that the pipeline must have, or one that is not there.
    """
    found = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        entry = index.get(name)
        if name in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry):
            found[name] = _part_class(folder, name, *entry)
        elif parameter.default is parameter.empty and not _does_without(kind, name):
            raise LoadError(
                f"{folder / INDEX}: {name} is {json.dumps(entry)}, and a {kind.__name__} needs one: "
                f'["library", "Class"]. {_MEND}, or mend the file.'
            )
    return found


def _does_without(kind: Any, name: str) -> bool:
    """Whether a pipeline may have no such part, or takes it from another repository."""
    return name in getattr(kind, "_optional_components", ()) or getattr(kind, "_load_connected_pipes", False)


def _part_class(folder: Path, name: str, library: str, called: str) -> Any:
    home: Any = getattr(diffusers.pipelines, library, None)
    if library in _LIBRARIES:
        home = importlib.import_module(library)
    if home is None:
        return None
    try:
        found = getattr(home, called)
        # What stands for a class whose package is not installed says so when it is looked at.
        getattr(found, "config_name", None)
        return found
    except (ImportError, AttributeError) as error:
        raise LoadError(
            f"{folder / INDEX}: {name} is a {library}.{called}, which cannot be imported: {error}. Another "
            f"version of {library} may have it; or give the part by name: {name}=…."
        ) from error


def _place(folder: Path, name: str) -> Path:
    """Return where a part's files are: in the folder of its name, or beside the index where it has none."""
    return folder / name if (folder / name).is_dir() else folder


def part_folder(folder: Path, name: str, kind: Any) -> Path:
    """Return where a part's files are, after a look at its configuration.

    Args:
        folder: the pipeline's.
        name: the part's.
        kind: its class.

    Raises:
        LoadError: what the class is made from is not there, cut short, or names no class.
    """
    own, where = folder / name, _place(folder, name)
    config, words = getattr(kind, "config_name", None), getattr(kind, "vocab_files_names", None)
    if isinstance(config, str):
        _check_config(where / config, own, name, "_class_name")
    elif hasattr(kind, "config_class"):
        _check_config(where / "config.json", own, name, "model_type", "architectures")
    elif words and not any(any(where.glob(each)) for each in ("tokenizer.json", "*.model", *words.values())):
        # Without any, transformers makes a tokenizer that knows no word, and says nothing.
        raise LoadError(f"{own} has none of {name}'s files ({', '.join(words.values())}). {_MEND}.")
    return where


def _check_config(path: Path, own: Path, name: str, *names: str) -> None:
    if not path.is_file():
        raise LoadError(f"{own} has no {path.name}, so there is no {name}. {_MEND}, or give {name}=….")
    if not any(each in _read(path) for each in names):
        # Its class would then be built in some default size.
        raise LoadError(f"{path} names no class for {name} ({names[0]}). {_MEND}.")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path} cannot be read: {error}. {_MEND}.") from error
    if not isinstance(found, dict):
        raise LoadError(f"{path} is no JSON object, as a configuration is. {_MEND}.")
    return found


def check_parts(
    folder: Path, classes: Mapping[str, Any], *, variant: str | None = None, pickled: bool = False
) -> None:
    """Refuse a folder of which something is missing or cut short, before any of its weights is read.

    Args:
        folder: the pipeline's.
        classes: what `part_classes` returned.
        variant: of the files of weights.
        pickled: whether weights may be pickles, which are not looked into.

    Raises:
        LoadError: with the part and its file.
    """
    for name, kind in classes.items():
        where = part_folder(folder, name, kind)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            _check_weights(where, name, variant, pickled)


def _check_weights(where: Path, name: str, variant: str | None, pickled: bool) -> None:
    files = weight_files(where, variant)
    for file in files:
        with reading(file):
            pass
    if not files and not pickled:
        if any(where.glob("*.bin")):
            raise LoadError(
                f"{where}: {name} has its weights as a pickle, which can run code when it is loaded. If you "
                "trust it, say so: use_safetensors=False."
            )
        raise LoadError(f"{where} has no safetensors file, so {name} has no weights. {_MEND}.")
    for index in _shard_indices(where, files, variant):
        shards = sorted(set(_read(index).get("weight_map", {}).values()))
        lost = [shard for shard in shards if not (where / shard).is_file()]
        if lost:
            raise LoadError(f"{index} names {lost[0]}, which is not there, so {name} lacks weights. {_MEND}.")


def weight_files(part: Path, variant: str | None = None) -> list[Path]:
    """Return a component's files of weights: the variant's where there are some, else the plain ones."""
    return _of_variant(sorted(part.glob("*.safetensors")), variant)


def _of_variant(files: list[AnyPath], variant: str | None) -> list[AnyPath]:
    chosen = [file for file in files if variant is not None and f".{variant}" in file.name]
    return chosen or [file for file in files if file.name.count(".") == 1]


def _shard_indices(part: Path, files: list[Path], variant: str | None) -> list[Path]:
    """Return what lists the shards among a component's files of weights."""
    varied = any(file.name.count(".") > 1 for file in files)
    ending = f".{variant}.json" if varied else ".index.json"
    return [index for index in part.glob("*.safetensors.index*.json") if index.name.endswith(ending)]


@contextmanager
def reading(file: Path) -> Iterator[Any]:
    """Open a safetensors file, of which tensors are read as they are asked for.

    Raises:
        LoadError: it is not there, or cut short.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{file} cannot be read: {error}. {_MEND}.") from error


def pickled(folder: Path, names: Collection[str]) -> bool:
    """Whether every component of these has its weights as a pickle."""
    return all(any(_place(folder, name).glob("*.bin")) for name in names)


def torn_pickle(folder: Path, name: str) -> str:
    """Say which of a component's pickles cannot be read, as weights and nothing else; empty if all can."""
    for file in sorted(_place(folder, name).glob("*.bin")):
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it
            said = str(error) or type(error).__name__
            return f"{file}, the weights of {name}, cannot be read: {said}. {_MEND}."
    return ""


def misshapen(folder: Path, name: str, module: nn.Module, variant: str | None = None) -> str:
    """Say which weight of a component's files has another shape than its configuration; empty if none has."""
    own = {path: tuple(each.shape) for path, each in module.state_dict().items()}
    for file in weight_files(_place(folder, name), variant):
        with reading(file) as weights:
            for key in own.keys() & {*weights.keys()}:
                found = tuple(weights.get_slice(key).get_shape())
                if found != own[key]:
                    return f"{file}: {key} of {name} is {found}, and by its configuration {own[key]}."
    return ""


def named_classes(folder: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    """Return the classes of the parts that an index names, of those that diffusers and transformers have."""
    found = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(each, str) for each in entry):
            try:
                found[name] = _part_class(folder, name, *entry)
            except LoadError:
                continue
    return {name: kind for name, kind in found.items() if kind is not None}


def kept_dtypes(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    """Return in which dtype each component's weights are kept, with ``default`` for the others."""
    found = {"default": torch.float32}
    for part in (folder, *sorted(each for each in folder.iterdir() if each.is_dir())):
        dtype = kept_dtype(part, variant)
        if dtype is not None:
            found["default" if part == folder else part.name] = dtype
    return found


def kept_dtypes_on_hub(
    repository: str, variant: str | None, *, revision: str | None = None, token: Any = None
) -> dict[str, torch.dtype]:
    """Return what `kept_dtypes` does of a repository, of whose weights only the first bytes are fetched."""
    hub = HfApi(token=token)
    files = [PurePath(name) for name in hub.list_repo_files(repository, revision=revision)]
    found = {"default": torch.float32}
    for part in sorted({file.parent for file in files}):
        weights = sorted(file for file in files if file.parent == part and file.suffix == ".safetensors")
        for file in _of_variant(weights, variant)[:1]:
            tensors = hub.parse_safetensors_file_metadata(repository, str(file), revision=revision).tensors
            kept = [_DTYPES[each.dtype] for each in tensors.values() if each.dtype in _DTYPES]
            if kept:
                found[part.name or "default"] = kept[0]
    return found


def kept_dtype(part: Path, variant: str | None = None) -> torch.dtype | None:
    """Return in which dtype a component's weights are kept; None if there are none."""
    dtypes = (_dtype(file) for file in weight_files(part, variant))
    return next((dtype for dtype in dtypes if dtype is not None), None)


def loading_info(
    folder: Path, components: Mapping[str, Any], variant: str | None = None
) -> dict[str, dict[str, list[str]]]:
    """Return by component which weights the files lack and which they have too many."""
    info: dict[str, dict[str, list[str]]] = {}
    for name, part in components.items():
        files = weight_files(_place(folder, name), variant)
        if not isinstance(part, nn.Module) or not files:
            continue
        kept = {key for file in files for key in _keys(file)}
        own = part.state_dict()
        # Tied weights are kept once, under one of their names.
        there = {own[key].data_ptr() for key in kept & own.keys()}
        missing = sorted(key for key in own.keys() - kept if own[key].data_ptr() not in there)
        info[name] = {"missing_keys": missing, "unexpected_keys": sorted(kept - own.keys())}
    return info


def lacking(module: nn.Module, *, elsewhere: bool = False) -> list[str]:
    """Return the paths of a loaded model's weights that its files did not have.

    Args:
        module: the model.
        elsewhere: whether weights on ``meta`` are kept elsewhere, as a device map does.
    """
    weights = {path: each for path, each in module.named_parameters() if not (elsewhere and each.is_meta)}
    lost = [path for path, each in weights.items() if each.is_meta]
    # transformers marks what it has read, and gives random values to the rest.
    read = [path for path, each in weights.items() if getattr(each, "_is_hf_initialized", False)]
    if lost or not read or getattr(module, "hf_quantizer", None) is not None:
        return lost
    needless = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    return [
        path
        for path in weights
        if path not in read and not any(re.search(pattern, path) for pattern in needless)
    ]


def _dtype(file: Path) -> torch.dtype | None:
    with reading(file) as weights:
        for key in weights.keys():  # noqa: SIM118 - it is no mapping
            dtype = weights.get_slice(key).get_dtype()
            if dtype in _DTYPES:
                return _DTYPES[dtype]
    return None


def _keys(file: Path) -> list[str]:
    with reading(file) as weights:
        return list(weights.keys())


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
