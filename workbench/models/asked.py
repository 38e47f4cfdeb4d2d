"""What a run is asked to keep and to change: checked before it starts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workbench.errors import InputError
from workbench.interventions.intervention import Intervention
from workbench.tracing.capture import Capture
from workbench.tracing.session import Probe
from workbench.tracing.sites import Site

Captured = str | Site | Probe
"""What can be asked for: a site, or a probe such as ``wb.Attention()``."""


def changes(interventions: Sequence[Intervention]) -> list[Intervention]:
    """Return the interventions as a list.

    Raises:
        InputError: a lone one, or something else.
    """
    if isinstance(interventions, Intervention):
        raise InputError("interventions takes a list: interventions=[wb.Patch(…)].")
    edits = list(interventions)
    for each in edits:
        if not isinstance(each, Intervention):
            raise InputError(f"{each!r} is not an intervention. Give wb.Patch(…) or another of them.")
    return edits


def listed(capture: Sequence[Captured]) -> list[Captured]:
    """Refuse a lone site, which as a sequence would be its letters."""
    if isinstance(capture, (str, Site)):
        raise InputError(f"capture takes a list of sites: capture=[{str(capture)!r}].")
    if not isinstance(capture, Iterable):
        raise InputError(f"capture takes a list: capture=[{type(capture).__name__}(…)].")
    return list(capture)


def captured(asked: Sequence[Captured]) -> tuple[str | Capture, ...]:
    """Return which sites the record will hold, as data.

    Raises:
        InputError: something that captures nothing, or a site in two ways.
    """
    for each in asked:
        if isinstance(each, type) or (not isinstance(each, (str, Site)) and not hasattr(each, "watching")):
            raise InputError(f"{each!r} captures nothing. Give a site, wb.Capture(…) or another probe.")
    sites = [str(Site.parse(each)) for each in asked if isinstance(each, (str, Site))]
    chosen = [each.site for each in asked if isinstance(each, Capture)]
    for site in chosen:
        if site in sites or chosen.count(site) > 1:
            raise InputError(f"{site} is captured in two ways in one run. Give one of them.")
    return tuple(
        each if isinstance(each, Capture) else str(Site.parse(each))
        for each in asked
        if isinstance(each, (str, Site, Capture))
    )
