"""Modules and methods as one writes them in a trace: ``model.unet.mid_block.attentions[0].output``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from workbench.errors import TraceError, UnknownNameError, nearest
from workbench.tracing.ports import PORTS
from workbench.tracing.rig import Target
from workbench.tracing.sites import Site, resolve
from workbench.tracing.trace import Trace


@dataclass(frozen=True)
class Home:
    """What proxies ask of their model.

    Attributes:
        current: returns the trace that is open, if one is.
        components: returns the parts as they are now: without weights, loaded, or exchanged.
    """

    current: Callable[[], Trace | None]
    components: Callable[[], Mapping[str, Any]]


class Ported:
    """A place whose ports (``input``, ``inputs``, ``output``, …) are read and replaced inside a trace."""

    def __init__(self, path: str, target: Any, home: Home) -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_home", home)

    @property
    def path(self) -> str:
        """The path from the pipeline, ``unet.mid_block``."""
        return str(self._path)

    def __getattr__(self, name: str) -> Any:
        if name in PORTS:
            return self._trace().value(Site(self._path, name))
        raise UnknownNameError(f"{self._path} has no port {name!r}.{nearest(name, PORTS)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in PORTS:
            raise UnknownNameError(
                f"Only the ports {', '.join(PORTS)} can be replaced, not {self._path}.{name}."
            )
        self._trace().replace(Site(self._path, name), value)

    def _trace(self) -> Trace:
        trace: Trace | None = self._home.current()
        if trace is None:
            raise TraceError(
                f"{self._path} has values only while the model runs. Read it in a block: "
                "with model.generate(prompt) as run: …"
            )
        return trace


class MethodProxy(Ported):
    """A method of a component, such as ``vae.decode``: called as ever, with ports like a module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method itself."""
        return self._target(*args, **kwargs)

    def __dir__(self) -> list[str]:
        return [*PORTS, "path"]

    def __repr__(self) -> str:
        return f"{self._path}: method"


class ModuleProxy(Ported):
    """A module of the model.

    Its children are attributes and items; everything else is the module's own.
    """

    @property
    def module(self) -> nn.Module:
        """The real module, as the model has it now."""
        found = resolve(self._home.components(), self._path)
        assert isinstance(found, nn.Module)
        return found

    def skip(self, value: Any) -> None:
        """Let the module return ``value`` the next time it is called, without running it.

        Raises:
            OutOfOrderError: it is running already.
        """
        self._trace().skip(self._path, value)

    def __getattr__(self, name: str) -> Any:
        children = self._target._modules  # of a scripted module no dict
        if name in children and children[name] is not None:
            return ModuleProxy(f"{self._path}.{name}", children[name], self._home)
        # An attention layer's number of heads is called like the port; in a run the port is meant.
        if name in PORTS and (self._home.current() is not None or not hasattr(self._target, name)):
            return super().__getattr__(name)
        if hasattr(self._target, name):
            own = getattr(self.module, name)
            # While it is watched, something else of ours stands in for it.
            bound = inspect.ismethod(own) or inspect.isfunction(getattr(type(self._target), name, None))
            method = bound and not name.startswith("_")
            return MethodProxy(f"{self._path}.{name}", own, self._home) if method else own
        known = [*self._target._modules, *PORTS]
        raise UnknownNameError(f"{self._path} has no module or port {name!r}.{nearest(name, known)}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in PORTS or name in self._target._modules:
            raise UnknownNameError(
                f"Only the ports {', '.join(PORTS)} can be replaced, not {self._path}.{name}. "
                f"To change the module itself: model.{self._path}.module"
            )
        super().__setattr__(name, value)

    def __getitem__(self, index: int | str) -> ModuleProxy:
        names = list(self._target._modules)
        if isinstance(index, int) and -len(names) <= index < len(names):
            index = names[index]
        if str(index) not in names:
            raise UnknownNameError(f"{self._path} has no child {index!r}.{nearest(str(index), names)}")
        child = self._target._modules[str(index)]
        return ModuleProxy(f"{self._path}.{index}", child, self._home)

    def __iter__(self) -> Iterator[ModuleProxy]:
        return (self[name] for name in self._target._modules)

    def __len__(self) -> int:
        return len(self._target._modules)

    def __dir__(self) -> list[str]:
        return [*self._target._modules, *PORTS, "path", "module", "skip"]

    def __repr__(self) -> str:
        return f"{self._path}: {type(self._target).__name__}"


def proxy(path: str, target: Target, home: Home) -> Ported:
    """Return what stands for a module or a method in a trace."""
    if isinstance(target, nn.Module):
        return ModuleProxy(path, target, home)
    return MethodProxy(path, getattr(target.owner, target.name), home)
