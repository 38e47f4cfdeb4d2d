"""What a pipeline can do besides running, on the model that holds it."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.tracing.storage.disk import merged

_ANOTHER_PIPELINE = ("from_", "load_config", "download", "get_config_dict", "extract_init_dict")
"""How the names begin of what makes or looks up another pipeline, and is no business of this one."""

_OF_PART = {
    f"{verb}_vae_{what}": ("vae", f"{verb}_{what}")
    for verb in ("enable", "disable")
    for what in ("slicing", "tiling")
}
"""Methods that pipelines once had and their parts have now."""

_MEMORY_EFFICIENT = "XFormers"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class PipelineMethods(ABC):
    """The public methods and properties of the pipeline, as the model's own.

    ``save_pretrained``, ``numpy_to_pil``, ``to``, ``device``, ``dtype``, ``set_progress_bar_config``,
    ``enable_attention_slicing``, ``enable_vae_tiling``, ``enable_model_cpu_offload``, ``load_lora_weights``
    and whatever else the pipeline's class has. A method that returns the pipeline returns the model. Asking
    for one loads the weights, if they are not loaded.
    """

    @property
    @abstractmethod
    def pipeline(self) -> Any:
        """The pipeline itself; its weights are loaded if they are not yet."""

    @property
    @abstractmethod
    def automodel(self) -> type:
        """The class of the pipeline."""

    @property
    @abstractmethod
    def dispatched(self) -> bool:
        """Whether the weights are loaded."""

    managers: dict[str, Any]

    @property
    @abstractmethod
    def components(self) -> dict[str, Any]:
        """The pipeline's parts by name, those that are there."""

    @property
    def device(self) -> torch.device:
        """Where the weights are; ``meta`` as long as they are not loaded."""
        if self.dispatched and hasattr(self.pipeline, "device"):
            device: torch.device = self.pipeline.device
            return device
        modules = [part for part in self.components.values() if isinstance(part, nn.Module)]
        devices = [each.device for module in modules for each in module.parameters()]
        return devices[0] if devices else torch.device("cpu")

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Save the pipeline as a folder, which opens again.

        Args:
            save_directory: the folder. What an earlier save left there is replaced when all is written, and
                not before.
            **options: of diffusers: ``safe_serialization``, ``variant``, ``max_shard_size``, ….

        Raises:
            InputError: a component's weights lie in shards.
            StoreError: it cannot be written; the folder is as it was.
        """
        parts = {name: part for name, part in self.components.items() if name in self.managers}
        sharded = [name for name, part in parts.items() if hasattr(part, "unshard")]
        if sharded:
            raise InputError(
                f"{', '.join(sharded)}: each rank has a part of the weights only. Gather them: "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict(part, "
                "options=StateDictOptions(full_state_dict=True)), and save that."
            )
        copies = {name: part for name, part in parts.items() if hasattr(part, "module")}
        try:
            for name, part in copies.items():
                setattr(self.pipeline, name, part.module)
            if not copies or torch.distributed.get_rank() == 0:
                save, target = self._method("save_pretrained"), Path(save_directory)
                if options.get("push_to_hub"):
                    options.setdefault("repo_id", target.name)
                with merged(target) as staging:
                    save(str(staging), **options)
        finally:
            for name, part in copies.items():
                setattr(self.pipeline, name, part)

    def memory(self) -> dict[str, dict[str, int]]:
        """Return what each component's weights take up, in bytes, loaded or not.

        Returns:
            By component, ``as_is``: what its weights take in the dtypes that they have, or will have when
            they are loaded; and ``float32``, ``bfloat16``, ``float16`` and ``int8``: what all of them would
            take in each. Values that are no floating-point numbers count as they are.
        """
        modules = {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}
        return {name: memory_of(module) for name, module in modules.items()}

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention a slice at a time, for less memory.

        Where memory-efficient attention is on, it wins: slices would take its place and cost both.

        Args:
            slice_size: ``"auto"`` is two slices, ``"max"`` a head at a time, a number the heads of a slice;
                None is off.

        Raises:
            InputError: none of these.
        """
        counted = isinstance(slice_size, int) and not isinstance(slice_size, bool) and slice_size > 0
        if slice_size is None:
            return self.disable_attention_slicing()
        if not counted and slice_size not in ("auto", "max"):
            raise InputError(f"slice_size={slice_size!r} is no size: give 'auto', 'max', 1 or more, or None.")
        efficient = [name for name, part in self.components.items() if _memory_efficient(part)]
        if efficient:
            warnings.warn(
                f"{', '.join(efficient)}: memory-efficient attention is on and does without slices. To have "
                "slices, switch it off first: model.disable_xformers_memory_efficient_attention().",
                UserWarning,
                stacklevel=2,
            )
            return None
        return self._method("enable_attention_slicing")(slice_size)  # type: ignore[no-any-return]

    def disable_attention_slicing(self) -> None:
        """Compute attention whole again; memory-efficient attention stays on where it is."""
        self._method("disable_attention_slicing")  # where there is none, this says so
        for part in self.components.values():
            if hasattr(part, "set_attention_slice") and not _memory_efficient(part):
                part.set_attention_slice(None)

    def _method(self, name: str) -> Any:
        """Return the pipeline's own method of a name that is ours too."""
        found = getattr(self.pipeline, name, None)
        if found is None:
            raise UnknownNameError(f"{self.automodel.__name__} has no method {name!r}: it is no pipeline.")
        return found

    def _of_pipeline(self, name: str) -> Any:
        """Return what the pipeline has under a name.

        Raises:
            UnknownNameError: neither a component nor anything of the pipeline's class.
        """
        if hasattr(self.automodel, name) and not name.startswith(_ANOTHER_PIPELINE):
            value = getattr(self.pipeline, name)
            return self._answering(value) if callable(value) else value
        part, method = _OF_PART.get(name, ("", ""))
        if hasattr(self.components.get(part), method):
            return getattr(getattr(self.pipeline, part), method)
        raise UnknownNameError(
            f"{self.automodel.__name__} has no component or method {name!r}."
            f"{nearest(name, [*self.components, *public(self.automodel)])}"
        )

    def _answering(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method, with the model for an answer where the pipeline would be."""

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            answer = method(*args, **kwargs)
            return self if answer is self.pipeline else answer

        return call


def memory_of(module: nn.Module) -> dict[str, int]:
    """Return what a module's weights take up as they are, and would in other dtypes, in bytes."""
    weights = [*module.parameters(), *module.buffers()]
    numbers = sum(each.numel() for each in weights if each.is_floating_point())
    fixed = sum(each.nbytes for each in weights if not each.is_floating_point())
    by_dtype = {str(dtype).removeprefix("torch."): numbers * dtype.itemsize + fixed for dtype in _DTYPES}
    return {"as_is": sum(each.nbytes for each in weights), **by_dtype}


def public(kind: type) -> list[str]:
    """Return the names of a pipeline's class that are for its users."""
    return [name for name in {*dir(kind), *_OF_PART} if not name.startswith(("_", *_ANOTHER_PIPELINE))]


def _memory_efficient(part: Any) -> bool:
    modules = part.modules() if isinstance(part, nn.Module) else ()
    return any(_MEMORY_EFFICIENT in type(getattr(each, "processor", None)).__name__ for each in modules)
