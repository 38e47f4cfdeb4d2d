"""Sites: where a value passes, spelled ``<module path>:<port><selector>``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.tracing.ports import PORTS
from workbench.tracing.rig import Method, Target
from workbench.tracing.structure import Leaf, spell
from workbench.tracing.system import is_scheduler

_SPELLING = re.compile(r"^(?P<path>[\w.]+)(?::(?P<port>\w+)(?P<leaf>(?:\.\w+|\[\d+\])*))?$")
_KEY = re.compile(r"\.(\w+)|\[(\d+)\]")

TICK = "scheduler.step"
"""The path of every scheduler's step, whatever the schedulers are called: each tick of a run passes there."""

RUN_VALUES = {"latents": f"{TICK}:output[0]", "noise_pred": f"{TICK}:input"}
"""Values that belong to the run and to no module, and the sites they pass: the latents after each tick,
and the guided prediction that the scheduler is handed."""


@dataclass(frozen=True)
class Site:
    """A place a value passes.

    Attributes:
        path: the module's path from the pipeline, ``unet.mid_block``, or a method's, ``vae.decode``;
            ``scheduler.step`` is the step of each scheduler there is, ``prior_scheduler.step`` of that one.
        port: which value there; ``output`` is exactly what was returned, ``input`` the first
            argument, ``inputs`` the pair ``(args, kwargs)``, ``heads`` an attention layer's per-head
            outputs and ``text_heads`` those for the text, ``query``, ``key`` and ``value`` what it
            hands to the kernel.
        leaf: the selector of one part where the port holds several, ``("sample",)`` or ``(1,)``.
    """

    path: str
    port: str = "output"
    leaf: Leaf = ()

    @classmethod
    def parse(cls, text: str | Site) -> Site:
        """Read ``unet.mid_block``, ``unet.mid_block:input``, ``unet:output.sample`` or ``latents``.

        Raises:
            InputError: the text is not spelled like a site.
            UnknownNameError: no such port.
        """
        if isinstance(text, Site):
            return text
        if not isinstance(text, str):
            raise _misspelled(text)
        return _parsed(text)

    def __str__(self) -> str:
        """Spell the site as `parse` reads it."""
        if self.port == "output" and not self.leaf:
            return self.path
        return f"{self.path}:{self.port}{spell(self.leaf)}"


def bare(site: Site) -> Site:
    """Return the port that a site is at, whatever part of its value it selects."""
    return Site(site.path, site.port) if site.leaf else site


def modules(components: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return every module by its path (``unet``, ``unet.conv_in``, …), components first."""
    found: dict[str, nn.Module] = {}
    for name, component in components.items():
        if isinstance(component, nn.Module):
            for path, module in component.named_modules(prefix=name):
                found[path] = module
    return found


def resolve_all(components: Mapping[str, Any], path: str) -> tuple[Target, ...]:
    """Return what to hook for ``path``: the module or method there, or every scheduler's step.

    Raises:
        UnknownNameError: there is none; the message lists the nearest paths.
    """
    if path == TICK:
        schedulers = {id(part): part for part in components.values() if is_scheduler(part)}
        return tuple(Method(each, "step") for each in schedulers.values()) or (resolve(components, path),)
    return (resolve(components, path),)


def resolve(components: Mapping[str, Any], path: str) -> Target:
    """Return the module or method at ``path``; of several schedulers' steps, the first.

    Raises:
        UnknownNameError: there is none; the message lists the nearest paths.
    """
    component, _, rest = path.partition(".")
    if path == TICK and component not in components:
        component = next((name for name, part in components.items() if is_scheduler(part)), component)
    if component in components:
        found = _below(components[component], rest)
        if isinstance(found, nn.Module):
            return found
        inside, _, name = rest.rpartition(".")
        owner = _below(components[component], inside)
        if name and not name.startswith("_") and callable(getattr(owner, name, None)):
            return Method(owner, name)
    known = [*modules(components), *RUN_VALUES]
    raise UnknownNameError(f"The model has no module or method {path!r}.{nearest(path, known)}")


def child(module: nn.Module, name: str) -> Any:
    """Return what a module has under a name, or None; torch itself searches longer for it."""
    children = module._modules  # of a scripted module no dict
    if name in children and children[name] is not None:
        return children[name]
    return getattr(module, name, None)


@cache
def _parsed(text: str) -> Site:
    match = _SPELLING.match(RUN_VALUES.get(text, text))
    if match is None:
        raise _misspelled(text)
    port = match["port"] or "output"
    if port not in PORTS:
        raise UnknownNameError(f"No port {port!r} in {text!r}.{nearest(port, PORTS)}")
    keys = tuple(name or int(index) for name, index in _KEY.findall(match["leaf"] or ""))
    return Site(match["path"], port, keys)


def _misspelled(text: Any) -> InputError:
    return InputError(
        f"{text!r} is not a site. Write a module path with an optional port: "
        "'unet.mid_block', 'unet.mid_block:input', 'unet.mid_block:output[0]'."
    )


def _below(root: Any, path: str) -> Any:
    """Return the module at ``path`` below ``root``; ``root`` itself if there is no path; else None."""
    found = root
    for name in path.split(".") if path else ():
        found = child(found, name) if isinstance(found, nn.Module) else None
        if not isinstance(found, nn.Module):
            return None
    return found
