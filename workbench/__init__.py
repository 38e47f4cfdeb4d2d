"""Diffusion Workbench: see inside diffusion models, and change what happens there.

The public names are loaded when they are first used, so that ``import workbench`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.attention.capture import Attention as Attention
    from workbench.experiments.experiment import Experiment as Experiment
    from workbench.interventions.patch import Patch as Patch
    from workbench.models.model import DiffusionModel as DiffusionModel
    from workbench.tracing.record import Record as Record
    from workbench.widgets.app import Workbench as Workbench
    from workbench.widgets.page import save_html as save_html

__version__ = "0.1.0"

_HOMES = {
    "Attention": "workbench.attention.capture",
    "Experiment": "workbench.experiments.experiment",
    "DiffusionModel": "workbench.models.model",
    "Patch": "workbench.interventions.patch",
    "Record": "workbench.tracing.record",
    "Workbench": "workbench.widgets.app",
    "errors": "workbench.errors",
    "save_html": "workbench.widgets.page",
    "zoo": "workbench.zoo",
}

__all__ = [
    "Attention",
    "DiffusionModel",
    "Experiment",
    "Patch",
    "Record",
    "Workbench",
    "__version__",
    "errors",
    "save_html",
    "zoo",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        from workbench.errors import UnknownNameError, nearest

        raise UnknownNameError(f"workbench has no {name!r}.{nearest(name, _HOMES)}")
    module = import_module(home)
    return module if home.rpartition(".")[2] == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
