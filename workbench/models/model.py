"""`DiffusionModel`: a pipeline, opened and ready to be looked into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from workbench import zoo
from workbench.errors import InputError
from workbench.models.folder import loading_info
from workbench.models.loading import fetched, load, locate, pipeline_class
from workbench.models.looking import Looking
from workbench.models.methods import PipelineMethods, public
from workbench.models.options import renamed
from workbench.models.proxy import Home, ModuleProxy, proxy
from workbench.models.running import Running
from workbench.models.skeleton import Skeleton
from workbench.models.spec import PipelineSpec, build
from workbench.tracing.sites import resolve


class DiffusionModel(Looking, Running, PipelineMethods):
    """A diffusion pipeline with every value in reach, and everything it can do besides running.

    Args:
        model: a zoo name (``"shapes-unet"``), a folder, a Hub id, or a live ``DiffusionPipeline``.
        automodel: the pipeline class to open it with, or its name in diffusers; None is
            ``DiffusionPipeline``, which takes the class that the folder names.
        dispatch: False builds the tree without weights, on torch's ``meta`` device, and loads them when
            something is run first, or at ``.dispatch()``; so it is with folders and Hub ids unless True is
            given. A zoo name is loaded at once.
        **options: passed to the class's ``from_pretrained``.

    Attributes:
        shapes: what each module returned in the first recorded run, as text by path.
        managers: by component, what spreads it over the ranks; empty where nothing is spread.

    Raises:
        LoadError, UnknownNameError, InputError: the model cannot be opened; the message says why.

    Example:
        >>> model = DiffusionModel("shapes-unet")
        >>> with model.generate("a red circle", num_inference_steps=20, seed=0) as run:
        ...     for step in run.steps[5:10]:
        ...         hidden = model.unet.mid_block.output
        ...         model.unet.mid_block.output = 0.5 * hidden
        >>> run.images[0]
    """

    def __init__(
        self, model: Any, *, automodel: Any = None, dispatch: bool | None = None, **options: Any
    ) -> None:
        super().__init__()
        named = isinstance(model, (str, Path))
        if named:
            options = renamed(options)
        if dispatch is None:
            # Code that comes with a folder can make anything of its parts.
            dispatch = not named or model in zoo.models() or bool(options.get("trust_remote_code"))
        self._open = partial(load, model, automodel=automodel, **options)
        self._skeleton: Skeleton | None = None
        self._loaded: Any = None
        if dispatch or not named:
            self._loaded, self._reference = self._open()
        else:
            self._skeleton = Skeleton(str(model), automodel=automodel, **options)
            self._reference = str(model)
        self._take_in_parts()

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        *,
        return_cached_folder: bool = False,
        output_loading_info: bool = False,
        parallel_scheme: Mapping[str, Mapping[str, Any]] | None = None,
        device: torch.device | str | None = None,
        move_to_device: bool | None = None,
        load_for_training: bool = False,
        components_to_load: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Open a folder or a Hub id, with its weights, as ``DiffusionPipeline.from_pretrained`` does.

        Args:
            reference: a zoo name, a folder or a Hub id.
            return_cached_folder: also return the folder that the model was loaded from.
            output_loading_info: also return, by component, ``missing_keys`` and ``unexpected_keys``; a model
                whose files lack some weights is then opened without them.
            parallel_scheme: by component, how it is spread over the ranks that ``torchrun`` started; see
                `workbench.models.parallel.schemes`. The model then has ``managers``.
            device: where to move components; None is this rank's CUDA device, or the CPU.
            move_to_device: move them there; None is with a ``device`` or a ``parallel_scheme``.
            load_for_training: make their parameters trainable.
            components_to_load: which components are moved and made trainable; None is all.
            **options: of ``from_pretrained``, and ``automodel``.

        Returns:
            The model; with what else was asked for, a tuple of it, the info and the folder, in this order.
        """
        options = renamed(options)
        opened = device is not None or bool(parallel_scheme)
        move_to_device = opened if move_to_device is None else move_to_device
        opened = opened or move_to_device or load_for_training or components_to_load is not None
        if not options.get("dispatch", True) and (opened or output_loading_info):
            raise InputError(
                "dispatch=False loads no weights: there are none to move, train or report on. Leave it out."
            )
        if opened:
            options.pop("dispatch", None)
            from workbench.models.parallel.opening import open_spread

            pipeline, managers = open_spread(
                str(reference),
                parallel_scheme=parallel_scheme,
                device=device,
                move_to_device=move_to_device,
                load_for_training=load_for_training,
                components_to_load=components_to_load,
                whole=not output_loading_info,
                **options,
            )
            model = cls(pipeline)
            model._reference, model.managers = str(reference), managers
        elif output_loading_info:
            options.pop("dispatch", None)
            pipeline, name = load(reference, whole=False, **options)
            model = cls(pipeline)
            model._reference = name
        else:
            model = cls(reference, **{"dispatch": True, **options})
        answers: list[Any] = [model]
        if output_loading_info or return_cached_folder:
            kind = pipeline_class(options.pop("automodel", None))
            folder = fetched(kind, locate(str(reference)), options)
            if output_loading_info:
                answers.append(loading_info(folder, model.components, options.get("variant")))
            if return_cached_folder:
                answers.append(folder)
        return answers[0] if len(answers) == 1 else tuple(answers)

    @classmethod
    def from_config(
        cls,
        reference: str | Path,
        spec: PipelineSpec | Mapping[str, Any] | str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        seed: int | None = None,
        parallel_scheme: Mapping[str, Mapping[str, Any]] | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Build a denoiser from its configuration, with random weights.

        Args:
            reference: a zoo name, a folder or a Hub id; of the denoiser only the configuration is read.
            spec: what to build: a `PipelineSpec`, a dict, or the path of a YAML file with one.
            dtype: of the weights, a dtype of torch or its name; None is float32.
            seed: of the weights; None leaves them to torch's own generator, of the first rank where there are
                several.
            parallel_scheme: as in `from_pretrained`. A shard has the weights that one process would draw.
            device: where to move everything; None leaves it on the CPU, or where the scheme has it.
            **options: of ``from_pretrained``.

        Raises:
            InputError: a spec with unknown keys, or without ``transformer_cls``.
            LoadError, UnknownNameError: it cannot be built; the message says why.

        Example:
            >>> spec = {"transformer_cls": "UNet2DConditionModel", "subfolder": "unet"}
            >>> DiffusionModel.from_config("shapes-unet", {**spec, "load_full_pipeline": True}, seed=0)
        """
        read, managers = PipelineSpec.read(spec), dict[str, Any]()
        if parallel_scheme or device is not None:
            from workbench.models.parallel.opening import build_spread

            pipeline, managers = build_spread(
                reference,
                read,
                dtype=dtype,
                seed=seed,
                parallel_scheme=parallel_scheme,
                device=device,
                **options,
            )
        else:
            pipeline = build(reference, read, dtype=dtype, seed=seed, **options)
        model = cls(pipeline)
        model.managers = managers
        return model

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline itself; its weights are loaded if they are not yet."""
        self.dispatch()
        return self._loaded

    def dispatch(self) -> None:
        """Load the weights now, if they are not loaded.

        Raises:
            LoadError: they cannot be loaded; the tree stays as it was.
        """
        if self._loaded is None:
            self._loaded, _ = self._open()
            self._skeleton = None

    @property
    def dispatched(self) -> bool:
        """Whether the weights are loaded."""
        return self._loaded is not None

    @property
    def automodel(self) -> type:
        """The class of the pipeline."""
        return type(self._loaded) if self._skeleton is None else self._skeleton.automodel

    @property
    def _home(self) -> Home:
        return Home(current=lambda: self._trace, components=lambda: self.components)

    @property
    def reference(self) -> str:
        """What the model was opened from; empty for a live pipeline."""
        return self._reference

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's parts by name, those that are there."""
        parts = self._loaded.components if self._skeleton is None else self._skeleton.components
        return {name: part for name, part in parts.items() if part is not None}

    def site(self, path: str) -> Any:
        """Return the module or method at a path, also one whose name clashes with an attribute of ours.

        Args:
            path: ``unet.mid_block``, ``vae.decode``, ``scheduler.step``.
        """
        return proxy(path, resolve(self.components, path), self._home)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        component = self.components.get(name)
        if isinstance(component, nn.Module):
            return ModuleProxy(name, component, self._home)
        if component is not None:
            return component
        return self._of_pipeline(name)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.components, *public(self.automodel)]

    def __iter__(self) -> Iterator[str]:
        raise TypeError("A DiffusionModel is not a sequence; model.components has its parts.")

    def __repr__(self) -> str:
        parts = ", ".join(self.components)
        return f"DiffusionModel({self._reference or self.automodel.__name__}: {parts})"
