"""How the app's views stand on the page: one eight-pixel grid."""

from __future__ import annotations

from typing import Any

import ipywidgets


def views(app: Any) -> list[ipywidgets.DOMWidget]:
    """Return the app's views, in reading order."""
    return [app.controls, app.tree, app.scrubber, app.images, app.map, app.code]


def arrange(app: Any) -> ipywidgets.GridBox:
    """Return the views in a grid: controls; components, steps and images; patch map and code."""
    areas = {
        "controls": app.controls,
        "tree": app.tree,
        "steps": app.scrubber,
        "images": app.images,
        "map": app.map,
        "code": app.code,
    }
    for name, view in areas.items():
        view.layout.grid_area = name
        view.layout.min_width = "0"
        view.layout.margin = "0"
    return ipywidgets.GridBox(
        list(areas.values()),
        layout=ipywidgets.Layout(
            grid_template_columns="264px minmax(0, 1fr) minmax(0, 1fr) 264px",
            grid_template_areas=(
                '"controls controls controls controls" "tree steps steps images" "map map code code"'
            ),
            grid_gap="8px",
            align_items="stretch",
            width="100%",
        ),
    )
