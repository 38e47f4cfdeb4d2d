"""`NeMoAutoDiffusionPipeline`: opening and building pipelines under the signatures of NeMo AutoModel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from workbench.models.parallel.managers import Manager
from workbench.models.parallel.opening import ParallelScheme, build_spread, open_spread
from workbench.models.spec import Parts, PipelineSpec


class NeMoAutoDiffusionPipeline(Parts):
    """A denoiser, with other components or alone; and two ways of getting a pipeline with its managers.

    For code written against NeMo AutoModel's class of this name; `DiffusionModel` takes what it returns.

    Args:
        transformer: the denoiser.
        **components: whatever else there is.

    Attributes:
        components: all that is there, by name.
    """

    def __init__(self, transformer: Any = None, **components: Any) -> None:
        given = {"transformer": transformer, **components}
        super().__init__(**{name: part for name, part in given.items() if part is not None})

    @property
    def transformer(self) -> Any:
        """The denoiser, or None."""
        return self.components.get("transformer")

    @transformer.setter
    def transformer(self, module: Any) -> None:
        self.components["transformer"] = module

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        *,
        parallel_scheme: ParallelScheme | None = None,
        device: torch.device | str | None = None,
        torch_dtype: torch.dtype | str = torch.bfloat16,
        move_to_device: bool = True,
        load_for_training: bool = False,
        components_to_load: Iterable[str] | None = None,
        **options: Any,
    ) -> tuple[Any, dict[str, Manager]]:
        """Open a pipeline with its weights.

        Args:
            pretrained_model_name_or_path: a folder, a Hub id or a zoo name.
            parallel_scheme: by component, how it is spread; see `workbench.models.parallel.schemes`.
            device: where to; None is this rank's CUDA device, or the CPU.
            torch_dtype: of the weights; ``"auto"`` is that of the files. ``dtype`` is the same.
            move_to_device: whether to move components there.
            load_for_training: whether to make parameters trainable.
            components_to_load: which components are moved and made trainable; None is all.
            **options: of diffusers' ``from_pretrained``.

        Returns:
            The diffusers pipeline, and by component its manager.

        Raises:
            InputError, UnknownNameError, LoadError: as `DiffusionModel.from_pretrained` does.
        """
        return open_spread(
            pretrained_model_name_or_path,
            parallel_scheme=parallel_scheme,
            device=device,
            move_to_device=move_to_device,
            load_for_training=load_for_training,
            components_to_load=components_to_load,
            dtype=options.pop("dtype", torch_dtype),
            **options,
        )

    @classmethod
    def from_config(
        cls,
        model_id: str,
        pipeline_spec: PipelineSpec | Mapping[str, Any],
        torch_dtype: torch.dtype | str = torch.bfloat16,
        device: torch.device | str | None = None,
        parallel_scheme: ParallelScheme | None = None,
        move_to_device: bool = True,
        components_to_load: Iterable[str] | None = None,
        **options: Any,
    ) -> tuple[Any, dict[str, Manager]]:
        """Build a denoiser with random, trainable weights.

        Args:
            model_id: a folder, a Hub id or a zoo name, of whose denoiser the configuration is read.
            pipeline_spec: what to build.
            torch_dtype: of the weights.
            device: where to; None is this rank's CUDA device, or the CPU.
            parallel_scheme: by component, how it is spread.
            move_to_device: whether to move components there.
            components_to_load: which components are moved and made trainable; None is all.
            **options: of diffusers' ``from_pretrained``, for the whole pipeline.

        Returns:
            The diffusers pipeline, or one of this class around the denoiser alone; and by component its
            manager.
        """
        pipeline, managers = build_spread(
            model_id,
            PipelineSpec.read(pipeline_spec),
            dtype=torch_dtype,
            parallel_scheme=parallel_scheme,
            device=device,
            move_to_device=move_to_device,
            load_for_training=True,
            components_to_load=components_to_load,
            **options,
        )
        return cls(**pipeline.components) if isinstance(pipeline, Parts) else pipeline, managers
