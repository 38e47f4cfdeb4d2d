"""A denoiser from its configuration, with random weights: what to build, and how."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import pydantic
import torch
import yaml
from pydantic.dataclasses import dataclass
from torch import nn

from workbench.errors import InputError, LoadError, UnknownNameError, nearest
from workbench.models.loading import dtype_of, from_pretrained, locate, pipeline_class
from workbench.models.options import asked_of_hub, check, renamed

_NAME = "pipeline_spec"


class _Named(type):
    """Says by name what a spec cannot be."""

    def __call__(cls, *values: Any, **named: Any) -> Any:
        try:
            return super().__call__(*values, **named)
        except pydantic.ValidationError as error:
            wrong = error.errors()
        known = [field.name for field in dataclasses.fields(cast("Any", cls))]
        unknown = [str(each["loc"][0]) for each in wrong if each["type"] == "unexpected_keyword_argument"]
        if unknown:
            raise InputError(
                f"A pipeline spec has no {', '.join(map(repr, unknown))}.{nearest(unknown[0], known)} "
                f"Its keys are {', '.join(known)}."
            )
        said = "; ".join(f"{each['loc'][0]}={each['input']!r}: {each['msg']}" for each in wrong)
        raise InputError(f"This is no pipeline spec: {said}.")


@dataclass(config=pydantic.ConfigDict(extra="forbid", strict=True))
class PipelineSpec(metaclass=_Named):
    """What `DiffusionModel.from_config` builds; the keys are those of NeMo AutoModel.

    Attributes:
        transformer_cls: the denoiser's class in diffusers, ``FluxTransformer2DModel``; a UNet's as well.
        pipeline_cls: the pipeline's class in diffusers, for the whole pipeline; empty is the one that the
            folder names.
        subfolder: where the denoiser's configuration is, and its name in the pipeline: ``unet`` for a UNet.
        load_full_pipeline: load the other components with their weights; if not, there is only the denoiser.
        enable_gradient_checkpointing: compute activations again in training, where the class can.
        low_cpu_mem_usage: make the weights in the dtype that is asked for; if not, in float32 first.
    """

    transformer_cls: str = ""
    pipeline_cls: str | None = ""
    subfolder: str = "transformer"
    load_full_pipeline: bool = False
    enable_gradient_checkpointing: bool = True
    low_cpu_mem_usage: bool = True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PipelineSpec:
        """Read a spec from a dict.

        Raises:
            InputError: a key that there is not, or a value of another type; all are named.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"A pipeline spec is read from a dict, not {values!r}.")
        return cls(**{str(key): value for key, value in values.items()})

    @classmethod
    def read(cls, given: PipelineSpec | Mapping[str, Any] | str | Path) -> PipelineSpec:
        """Return a spec as it is given: one, a dict, or the path of a YAML file.

        Of a dict or file that holds more, the part under ``pipeline_spec`` counts.

        Raises:
            InputError: no such file, or none that holds a spec.
        """
        if isinstance(given, PipelineSpec):
            return given
        values: Any = given
        if isinstance(given, (str, Path)):
            try:
                values = yaml.safe_load(Path(given).expanduser().read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise InputError(f"{given} cannot be read as a pipeline spec: {error}") from error
        if isinstance(values, Mapping) and isinstance(values.get(_NAME), Mapping):
            values = values[_NAME]
        if not isinstance(values, Mapping):
            raise InputError(
                f"A pipeline spec is a PipelineSpec, a dict or a YAML file with one, not {given!r}."
            )
        return cls.from_dict(values)

    def validate_for_from_config(self) -> None:
        """Refuse what nothing can be built from.

        Raises:
            InputError: no ``transformer_cls``, or no ``subfolder``.
        """
        if not self.transformer_cls:
            raise InputError(
                "A pipeline spec needs transformer_cls, the class to build: 'FluxTransformer2DModel', "
                "'UNet2DConditionModel'. It is the _class_name in the component's config.json."
            )
        if not self.subfolder:
            raise InputError("A pipeline spec needs subfolder, where the config is: 'transformer', 'unet'.")


class Parts:
    """Components that are no whole pipeline: a denoiser alone, say."""

    def __init__(self, **components: Any) -> None:
        self.components = components

    def __call__(self, **_: Any) -> Any:
        """Refuse.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"There is only {', '.join(self.components)}, and no pipeline that runs it. Build the whole with "
            "load_full_pipeline=True, or run your own loop: with model.trace_loop(components={…}) as run: …"
        )

    def __getattr__(self, name: str) -> Any:
        components = vars(self).get("components", {})
        if name not in components:
            raise AttributeError(name)
        return components[name]


def build(
    reference: str | Path,
    spec: PipelineSpec,
    *,
    dtype: torch.dtype | str | None = None,
    seed: int | None = None,
    through: Callable[[Callable[[], nn.Module]], nn.Module] = operator.call,
    **options: Any,
) -> Any:
    """Make a pipeline whose denoiser has random weights.

    Args:
        reference: a zoo name, a folder or a Hub id; of the denoiser only the configuration is read.
        spec: what to build.
        dtype: of the weights, a dtype of torch or its name; None is float32.
        seed: of the weights; None leaves them to torch's own generator.
        through: calls what makes the denoiser, and returns it.
        **options: of ``from_pretrained``.

    Raises:
        LoadError: the configuration is not there, or does not fit the class.
        UnknownNameError: diffusers has no such class.
        InputError: the spec is not complete.
    """
    spec.validate_for_from_config()
    asked = renamed(options)
    if "dtype" in asked:
        raise InputError("Give the dtype of the weights as dtype= only.")
    kept = torch.float32 if dtype is None else dtype_of(dtype)
    if not spec.load_full_pipeline:
        others = [name for name in asked if name not in asked_of_hub(asked)]
        if others:
            raise InputError(f"{', '.join(others)} is for a whole pipeline: load_full_pipeline=True.")
        alone = (Path(reference).expanduser() / spec.subfolder).is_dir()
        folder = str(Path(reference).expanduser()) if alone else locate(str(reference))
        return Parts(**{spec.subfolder: through(partial(_denoiser, folder, spec, kept, seed, asked))})
    kind, folder = pipeline_class(spec.pipeline_cls or None), locate(str(reference))
    check(kind, folder, asked)
    denoiser = through(partial(_denoiser, folder, spec, kept, seed, asked))
    return from_pretrained(kind, folder, {**asked, "dtype": kept, spec.subfolder: denoiser})


def _denoiser(
    folder: str, spec: PipelineSpec, dtype: torch.dtype, seed: int | None, options: Mapping[str, Any]
) -> nn.Module:
    kind = _model_class(spec.transformer_cls)
    before = torch.get_default_dtype()
    try:
        config = kind.load_config(folder, subfolder=spec.subfolder, **asked_of_hub(options))
        with torch.random.fork_rng([], enabled=seed is not None):
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            if spec.low_cpu_mem_usage:
                torch.set_default_dtype(dtype)
            module: nn.Module = kind.from_config(config)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise LoadError(
            f"{folder}: its {spec.subfolder} could not be built as a {spec.transformer_cls}: {error}"
        ) from error
    finally:
        torch.set_default_dtype(before)
    if spec.enable_gradient_checkpointing and getattr(module, "_supports_gradient_checkpointing", False):
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    return module.to(dtype)


def _model_class(name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None) if name in dir(diffusers) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        known = [each for each in dir(diffusers) if "Transformer" in each or "UNet" in each]
        raise UnknownNameError(f"diffusers has no model {name!r}.{nearest(name, known)}")
    return found
