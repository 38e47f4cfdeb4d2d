"""`Diffuser`: a pipeline with the two names that nnsight's has, for code written against those."""

from __future__ import annotations

from typing import Any

from workbench.errors import InputError
from workbench.models.loading import load, pipeline_class


class Diffuser:
    """A pipeline, to be called and not traced.

    Args:
        pipeline: a pipeline class, its name in diffusers, or a pipeline object.
        *args: where the class opens it from: a folder, a zoo name or a Hub id.
        **options: passed to the class's ``from_pretrained``.

    Attributes:
        pipeline: the pipeline.

    Raises:
        InputError: a class without anything to open, or an object with.
        LoadError, UnknownNameError: it cannot be opened.
    """

    def __init__(self, pipeline: Any, *args: Any, **options: Any) -> None:
        if isinstance(pipeline, (type, str)):
            kind = pipeline_class(pipeline)
            if len(args) != 1:
                raise InputError(
                    f"Diffuser({kind.__name__}, reference) takes one folder, zoo name or Hub id."
                )
            self.pipeline = load(args[0], automodel=kind, **options)[0]
            return
        if args:
            raise InputError("A pipeline object is used as it is; there is nothing to open it from.")
        self.pipeline = load(pipeline, **options)[0]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline and return its output."""
        return self.pipeline(*args, **kwargs)
