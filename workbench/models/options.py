"""The options of ``from_pretrained``: today's, those that diffusers 0.14 had besides, and what is refused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE

from workbench.errors import InputError, LoadError, UnknownNameError, WorkbenchError, nearest
from workbench.models.folder import INDEX, named_classes, part_folder, read_index

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")

_KNOWN = (
    *_HUB,
    "custom_pipeline",
    "custom_revision",
    "device_map",
    "disable_mmap",
    "dtype",
    "load_connected_pipeline",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "provider",
    "provider_options",
    "quantization_config",
    "sess_options",
    "torch_dtype",
    "trust_remote_code",
    "use_flashpack",
    "use_onnx",
    "use_safetensors",
    "variant",
)
_WITHOUT_EFFECT = {
    "mirror": "set HF_ENDPOINT in the environment for another server",
    "proxies": "set HTTP_PROXY and HTTPS_PROXY in the environment",
    "resume_download": "a download that was cut off is always gone on with",
}
_TEXTS = ("*.json", "*.txt", "*.model", "*.py")
_RETURNS = ("output_loading_info", "return_cached_folder")


def renamed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under today's names.

    ``use_auth_token`` is ``token``; ``resume_download`` and ``mirror`` have no effect any more, and warn.

    Raises:
        InputError: an option under both its names, or one that only ``from_pretrained`` can answer.
    """
    today = dict(options)
    for name in _RETURNS:
        if name in today:
            raise InputError(f"{name}= returns more than a model: use DiffusionModel.from_pretrained(…).")
    for name, instead in _WITHOUT_EFFECT.items():
        if name in today:
            today.pop(name)
            warnings.warn(f"{name} has no effect any more: {instead}.", UserWarning, stacklevel=2)
    for old, new in (("use_auth_token", "token"), ("torch_dtype", "dtype")):
        if old in today:
            if new in today:
                raise InputError(f"{old} and {new} are the same option; give {new} only.")
            today[new] = today.pop(old)
    return today


def asked_of_hub(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of what is fetched, and from where."""
    return {name: options[name] for name in _HUB if name in options}


def check(kind: Any, folder: str, options: Mapping[str, Any]) -> None:
    """Refuse options that nothing takes, and code from elsewhere that nobody asked for.

    Args:
        kind: the pipeline class that will be asked.
        folder: the pipeline's folder, or its Hub id.
        options: under today's names.

    Raises:
        UnknownNameError: diffusers would drop an option without effect.
        InputError: code would run that did not come with diffusers.
    """
    index = index_of(folder, options)
    named = index.get("_class_name")
    custom = options.get("custom_pipeline")
    if not options.get("trust_remote_code", False):
        if custom is not None:
            raise InputError(
                f"custom_pipeline={custom!r} runs code that did not come with diffusers. If you trust it, "
                "say so: trust_remote_code=True."
            )
        if brings_code(folder, index):
            raise InputError(
                f"{folder} brings Python code of its own, which loading would run. If you trust it, say so: "
                "trust_remote_code=True."
            )
    if custom is None and isinstance(named, str) and not chooses(kind):
        known = [*_KNOWN, *_parts_of(kind, named)]
        for name in options:
            if name not in known:
                raise UnknownNameError(f"{named} takes no option {name!r}.{nearest(name, known)}")


def index_of(folder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the index of a pipeline in a folder or on the Hub.

    Raises:
        LoadError: it is not there, cannot be fetched or cannot be read.
    """
    return read_index(texts(folder, options, [INDEX]))


def texts(found: str, options: Mapping[str, Any], patterns: Sequence[str] = _TEXTS) -> Path:
    """Return the folder of a pipeline; of one on the Hub, only its configurations are fetched.

    Args:
        found: a folder or a Hub id.
        options: of ``from_pretrained``.
        patterns: of the files to fetch.

    Raises:
        LoadError: they cannot be fetched.
    """
    if Path(found).is_dir():
        return Path(found)
    try:
        return Path(snapshot_download(found, allow_patterns=[*patterns], **asked_of_hub(options)))
    except Exception as error:
        raise LoadError(unfetched(found, options, error, _unconfigured(found, options))) from error


def _unconfigured(found: str, options: Mapping[str, Any]) -> str:
    """Say of which parts of a repository the Hub's cache lacks the configuration, if it has the index."""
    path = try_to_load_from_cache(found, INDEX, options.get("cache_dir"), options.get("revision"))
    if not isinstance(path, str):
        return ""
    folder, lost = Path(path).parent, []
    try:
        for name, kind in named_classes(folder, read_index(folder)).items():
            try:
                part_folder(folder, name, kind)
            except LoadError:
                lost.append(name)
    except WorkbenchError:
        return ""
    return lacking_of(folder, lost)


def lacking_of(folder: Path, parts: Sequence[str]) -> str:
    """Say what a folder has not all of."""
    return f"\nNot all is in {folder} of {', '.join(parts)}." if parts else ""


def unfetched(found: str, options: Mapping[str, Any], error: Exception, lack: str = "") -> str:
    """Say why a repository could not be fetched, what is lacking of it, and what can be done."""
    cache, said = options.get("cache_dir") or HF_HUB_CACHE, str(error) or type(error).__name__
    return (
        f"{found} could not be fetched into {cache}: {said}{lack}\nWhat is there is kept: try again, with a "
        "network and room on the disk, or with another cache_dir=…."
    )


def brings_code(folder: str | Path, index: Mapping[str, Any]) -> bool:
    """Whether a pipeline or one of its parts is of a class that a folder brings along."""
    return isinstance(index.get("_class_name"), list) or any(
        _own_code(folder, *each) for each in index.items()
    )


def _own_code(folder: str | Path, name: str, entry: Any) -> bool:
    """Whether a component's class is one of a file beside its weights."""
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
        return False
    return (Path(folder) / name / f"{entry[0]}.py").is_file()


def chooses(kind: Any) -> bool:
    """Whether a class chooses another by its options, as ``AutoPipelineForText2Image`` does."""
    return "kwargs" in inspect.signature(kind).parameters


def _parts_of(kind: Any, named: str) -> tuple[str, ...]:
    import diffusers

    classes = (getattr(diffusers, named, kind), kind)
    return tuple(name for each in classes for name in inspect.signature(each).parameters)
