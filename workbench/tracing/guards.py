"""Settings of a model under which hooks would miss what they are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from workbench.errors import GuardError
from workbench.tracing.rig import Target
from workbench.tracing.sites import Site


def check(components: Mapping[str, Any], places: Mapping[Site, Target]) -> None:
    """Refuse, before the run, what would give wrong or missing values.

    Raises:
        GuardError: with the component and what to switch off.
    """
    compiled: dict[str, bool] = {}
    for site in places:
        component = site.path.partition(".")[0]
        module = components[component]
        if not isinstance(module, nn.Module):
            continue
        if component not in compiled:
            compiled[component] = _compiled(module)
        if compiled[component] and site.path != component:
            raise GuardError(
                f"{component} is compiled: a hook on {site.path} would never fire. "
                f"Load it without torch.compile, or trace {component} itself."
            )
        if getattr(module, "is_cache_enabled", False):
            raise GuardError(
                f"{component} has a cache that skips blocks, so {site.path} would pass in some steps only. "
                f"Switch it off: {component}.disable_cache()."
            )


def _compiled(module: nn.Module) -> bool:
    return any(
        type(each).__name__ == "OptimizedModule" or getattr(each, "_compiled_call_impl", None) is not None
        for each in module.modules()
    )
