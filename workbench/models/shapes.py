"""What each module returned: a probe that looks once at every module of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from workbench.tracing.guards import hookable
from workbench.tracing.record import Record
from workbench.tracing.rig import Owned
from workbench.tracing.session import Session
from workbench.tracing.sites import modules
from workbench.tracing.structure import leaves


class Shapes:
    """A probe that notes what each module returned, its shapes and bytes, the first time it ran."""

    def __init__(self) -> None:
        self.shapes: dict[str, dict[tuple[str | int, ...], tuple[int, ...]]] = {}
        self.bytes: dict[str, int] = {}
        self._hooks: dict[str, Owned] = {}

    @contextmanager
    def watching(self, session: Session) -> Iterator[None]:
        """Watch the first output of every module that is not compiled, then let go of it."""
        components = session.system.components
        for path, module in modules(components).items():
            if hookable(components, path):
                self._watch(session, path, module)
        try:
            yield
        finally:
            self._hooks.clear()

    def deliver(self, record: Record) -> None:
        """Nothing goes into the record: the shapes are the model's."""

    def text(self) -> dict[str, str]:
        """Return the shapes as written in the tree: ``1×96×8×8``."""
        return {
            path: ", ".join("×".join(map(str, shape)) for shape in list(found.values())[:2])
            for path, found in self.shapes.items()
            if found
        }

    def _watch(self, session: Session, path: str, module: nn.Module) -> None:
        def note(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            session.rig.drop(self._hooks.pop(path))
            found = dict(leaves(output))
            self.shapes[path] = {leaf: tuple(each.shape) for leaf, each in found.items()}
            self.bytes[path] = sum(each.numel() * each.element_size() for each in found.values())

        self._hooks[path] = session.rig.after(module, note)
