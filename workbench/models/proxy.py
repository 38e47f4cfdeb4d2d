"""Modules as one writes them in a trace: ``model.unet.mid_block.attentions[0].output``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from workbench.errors import TraceError, UnknownNameError, nearest
from workbench.tracing.sites import Site
from workbench.tracing.trace import Trace

PORTS = ("input", "inputs", "output")


class ModuleProxy:
    """A module of the model.

    Its ports ``input``, ``inputs`` and ``output`` are read and replaced inside a trace; its children
    are attributes and items; everything else is the module's own.
    """

    def __init__(self, path: str, module: nn.Module, current: Callable[[], Trace | None]) -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_current", current)

    @property
    def path(self) -> str:
        """The path from the pipeline, ``unet.mid_block``."""
        return str(self._path)

    @property
    def module(self) -> nn.Module:
        """The real module."""
        module: nn.Module = self._module
        return module

    def __getattr__(self, name: str) -> Any:
        child = self._module._modules.get(name)
        if child is not None:
            return ModuleProxy(f"{self._path}.{name}", child, self._current)
        if name in PORTS:
            return self._trace().value(Site(self._path, name))
        if hasattr(self._module, name):
            return getattr(self._module, name)
        known = [*self._module._modules, *PORTS]
        raise UnknownNameError(f"{self._path} has no module or port {name!r}.{nearest(name, known)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in PORTS or name in self._module._modules:
            raise UnknownNameError(
                f"Only the ports {', '.join(PORTS)} can be replaced, not {self._path}.{name}. "
                f"To change the module itself: model.{self._path}.module"
            )
        self._trace().replace(Site(self._path, name), value)

    def __getitem__(self, index: int | str) -> ModuleProxy:
        names = list(self._module._modules)
        if isinstance(index, int) and -len(names) <= index < len(names):
            index = names[index]
        if str(index) not in names:
            raise UnknownNameError(f"{self._path} has no child {index!r}.{nearest(str(index), names)}")
        child = self._module._modules[str(index)]
        return ModuleProxy(f"{self._path}.{index}", child, self._current)

    def __iter__(self) -> Iterator[ModuleProxy]:
        return (self[name] for name in self._module._modules)

    def __len__(self) -> int:
        return len(self._module._modules)

    def __dir__(self) -> list[str]:
        return [*self._module._modules, *PORTS, "path", "module"]

    def __repr__(self) -> str:
        return f"{self._path}: {type(self._module).__name__}"

    def _trace(self) -> Trace:
        trace: Trace | None = self._current()
        if trace is None:
            raise TraceError(
                f"{self._path} has values only while the model runs. Read it in a block: "
                "with model.generate(prompt) as run: …"
            )
        return trace
