"""Which classes a record may name, and how they are found again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from operator import attrgetter
from typing import Any

from torch import nn

from workbench.errors import StoreError

_LIBRARIES = ("diffusers", "transformers")


def is_data(kind: type) -> bool:
    """Whether a class is plain data of ours: a frozen dataclass."""
    params = getattr(kind, "__dataclass_params__", None)
    return kind.__module__.partition(".")[0] == "workbench" and params is not None and params.frozen


def is_holder(kind: type) -> bool:
    """Whether a class of the libraries is known by its attributes: a distribution, a cache."""
    return (
        kind.__module__.partition(".")[0] in _LIBRARIES
        and can_name(kind)
        and not issubclass(kind, (nn.Module, type))
        and getattr(kind, "__dictoffset__", 0) != 0
    )


def can_name(kind: type) -> bool:
    """Whether a class is found by its name: one made in a function is not."""
    return "<" not in kind.__qualname__


def name_of(kind: type) -> str:
    """Spell a class as ``module:name``."""
    return f"{kind.__module__}:{kind.__qualname__}"


def find(name: str, fits: Callable[[type], bool]) -> Any:
    """Return the class of a name.

    Args:
        name: as `name_of` spells it. Modules of the libraries and of ours are imported, of others only
            those that are imported already: opening a record runs no code of a stranger's.
        fits: whether a class is of the kind that is looked for.

    Raises:
        StoreError: the class cannot be had, or is of another kind.
    """
    module, _, path = name.partition(":")
    if module.partition(".")[0] in (*_LIBRARIES, "workbench"):
        import_module(module)
    elif module not in sys.modules:
        raise StoreError(
            f"A value in the record is a {path} of {module}. Import {module} first, then read it again."
        )
    kind = attrgetter(path)(sys.modules[module])
    if not isinstance(kind, type) or not fits(kind):
        raise StoreError(
            f"{name} is not a class that a record holds; the file was changed since it was saved."
        )
    return kind
