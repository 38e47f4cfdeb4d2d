"""Sites: where a value passes, spelled ``<module path>:<port><selector>``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.tracing.structure import Leaf, spell

_SPELLING = re.compile(r"^(?P<path>[\w.]+)(?::(?P<port>\w+)(?P<leaf>(?:\.\w+|\[\d+\])*))?$")
_KEY = re.compile(r"\.(\w+)|\[(\d+)\]")

PORTS = ("input", "inputs", "output", "probs")


@dataclass(frozen=True)
class Site:
    """A place a value passes.

    Attributes:
        path: the module's path from the pipeline, ``unet.mid_block``.
        port: which value there; ``output`` is exactly what the module returned, ``input`` its first
            argument, ``inputs`` the pair ``(args, kwargs)``, ``probs`` attention weights.
        leaf: the selector of one part where the port holds several, ``("sample",)`` or ``(1,)``.
    """

    path: str
    port: str = "output"
    leaf: Leaf = ()

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read ``unet.mid_block``, ``unet.mid_block:input`` or ``unet:output.sample``.

        Raises:
            InputError: the text is not spelled like a site.
            UnknownNameError: no such port.
        """
        if isinstance(text, Site):
            return text
        match = _SPELLING.match(text) if isinstance(text, str) else None
        if match is None:
            raise InputError(
                f"{text!r} is not a site. Write a module path with an optional port: "
                "'unet.mid_block', 'unet.mid_block:input', 'unet.mid_block:output[0]'."
            )
        port = match["port"] or "output"
        if port not in PORTS:
            raise UnknownNameError(f"No port {port!r} in {text!r}.{nearest(port, PORTS)}")
        keys = tuple(name or int(index) for name, index in _KEY.findall(match["leaf"] or ""))
        return cls(match["path"], port, keys)

    def __str__(self) -> str:
        """Spell the site as `parse` reads it."""
        if self.port == "output" and not self.leaf:
            return self.path
        return f"{self.path}:{self.port}{spell(self.leaf)}"


def modules(components: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return every module by its path (``unet``, ``unet.conv_in``, …), components first."""
    found: dict[str, nn.Module] = {}
    for name, component in components.items():
        if isinstance(component, nn.Module):
            for path, module in component.named_modules(prefix=name):
                found[path] = module
    return found


def resolve(components: Mapping[str, Any], path: str) -> nn.Module:
    """Return the module at ``path``.

    Raises:
        UnknownNameError: there is none; the message lists the nearest paths.
    """
    component, _, rest = path.partition(".")
    root = components.get(component)
    if isinstance(root, nn.Module):
        try:
            return root.get_submodule(rest)
        except AttributeError:
            pass
    raise UnknownNameError(f"The model has no module {path!r}.{nearest(path, modules(components))}")
