"""The options of ``from_pretrained``: today's, those that diffusers 0.14 had besides, and what is refused."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import nn

from workbench.errors import InputError, UnknownNameError, nearest

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")

_KNOWN = (
    *_HUB,
    "proxies",
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
    "resume_download": "a download that was cut off is always gone on with",
}
_INDEX = "model_index.json"
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
        if isinstance(named, list) or any(_own_code(folder, *each) for each in index.items()):
            raise InputError(
                f"{folder} brings Python code of its own, which loading would run. If you trust it, say so: "
                "trust_remote_code=True."
            )
    if custom is None and isinstance(named, str) and not _takes_all(kind):
        known = [*_KNOWN, *_parts_of(kind, named)]
        for name in options:
            if name not in known:
                raise UnknownNameError(f"{named} takes no option {name!r}.{nearest(name, known)}")


def kept_dtypes(folder: Path, variant: str | None) -> dict[str, torch.dtype]:
    """Return in which dtype each component's weights are kept, with ``default`` for the others."""
    found = {"default": torch.float32}
    for part in sorted(each for each in folder.iterdir() if each.is_dir()):
        dtypes = [dtype for file in weight_files(part, variant) if (dtype := _dtype(file)) is not None]
        if dtypes:
            found[part.name] = dtypes[0]
    return found


def loading_info(
    folder: Path, components: Mapping[str, Any], variant: str | None = None
) -> dict[str, dict[str, list[str]]]:
    """Return by component which weights the files lack and which they have too many."""
    info: dict[str, dict[str, list[str]]] = {}
    for name, part in components.items():
        files = weight_files(folder / name, variant)
        if not isinstance(part, nn.Module) or not files:
            continue
        kept = {key for file in files for key in _keys(file)}
        own = part.state_dict()
        # Tied weights are kept once, under one of their names.
        there = {own[key].data_ptr() for key in kept & own.keys()}
        missing = sorted(key for key in own.keys() - kept if own[key].data_ptr() not in there)
        info[name] = {"missing_keys": missing, "unexpected_keys": sorted(kept - own.keys())}
    return info


def index_of(folder: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pipeline's index; empty where it cannot be fetched, which loading will say."""
    path = Path(folder) / _INDEX
    if not Path(folder).is_dir():
        try:
            path = Path(hf_hub_download(folder, _INDEX, **asked_of_hub(options)))
        except (OSError, ValueError, TypeError):
            # What cannot be fetched is said by the loading itself.
            return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _own_code(folder: str, name: str, entry: Any) -> bool:
    """Whether a component's class is one of a file beside its weights."""
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
        return False
    return (Path(folder) / name / f"{entry[0]}.py").is_file()


def _takes_all(kind: Any) -> bool:
    """Whether a class chooses another by its options, as ``AutoPipelineForText2Image`` does."""
    return "kwargs" in inspect.signature(kind).parameters


def _parts_of(kind: Any, named: str) -> tuple[str, ...]:
    import diffusers

    classes = (getattr(diffusers, named, kind), kind)
    return tuple(name for each in classes for name in inspect.signature(each).parameters)


def weight_files(part: Path, variant: str | None = None) -> list[Path]:
    """Return a component's files of weights: the variant's where there are some, else the plain ones."""
    files = sorted(part.glob("*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1]
    return [file for file in files if variant is not None and f".{variant}" in file.name] or plain


def _dtype(file: Path) -> torch.dtype | None:
    with safe_open(file, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - it is no mapping
            dtype = weights.get_slice(key).get_dtype()
            if dtype in _DTYPES:
                return _DTYPES[dtype]
    return None


def _keys(file: Path) -> Iterator[str]:
    with safe_open(file, framework="pt") as weights:
        yield from weights.keys()


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
