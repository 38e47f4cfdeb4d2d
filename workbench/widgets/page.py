"""Saving widgets as one HTML file that works without a kernel and without a network."""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.widgets.element import Element, bundle_text

_PAGE = Path(__file__).with_name("page.html")
_BINARY = (bytes, bytearray, memoryview)

Rows = Element | Sequence[Element | Sequence[Element]]


def save_html(widgets: Rows, path: str | os.PathLike[str], *, title: str = "Workbench") -> Path:
    """Writes widgets to a page that still scrubs, with everything it needs inside.

    Args:
        widgets: one widget, or a list of rows; a row is a widget or a list of widgets side by side.
        path: the file to write; its folder must exist.
        title: the title of the page.

    Returns:
        The path written.

    Raises:
        InputError: something that is not a widget of the workbench, or no widget at all.
        LoadError: the front end is not built.
    """
    rows = _rows(widgets)
    bundles = {element._bundle: bundle_text(element._bundle) for row in rows for element in row}
    saved = {"bundles": bundles, "rows": [[_state(element) for element in row] for row in rows]}
    parts = {
        "title": html.escape(title),
        "saved": _json_for_script(saved),
        "script": bundle_text("page").replace("</", "<\\/"),
    }
    target = Path(path)
    target.write_text(_fill(_PAGE.read_text(encoding="utf-8"), parts), encoding="utf-8")
    return target


def _rows(widgets: object) -> list[list[Element]]:
    listed: Iterable[object] = widgets if isinstance(widgets, list | tuple) else [widgets]
    rows = [[_element(item) for item in (row if isinstance(row, list | tuple) else [row])] for row in listed]
    if not any(rows):
        raise InputError("save_html was given no widget.")
    return [row for row in rows if row]


def _element(item: object) -> Element:
    if not isinstance(item, Element):
        raise InputError(f"save_html takes widgets of the workbench, not {type(item).__name__}.")
    return item


def _state(element: Element) -> dict[str, Any]:
    """A widget's traits, with the binary ones apart as base64."""
    buffers: list[tuple[list[str | int], str]] = []
    names = [name for name in element.trait_names(sync=True) if not name.startswith("_") and name != "layout"]
    state = {name: _apart(getattr(element, name), [name], buffers) for name in sorted(names)}
    state["_saved"] = True
    return {"bundle": element._bundle, "width": element._page_width, "state": state, "buffers": buffers}


def _apart(value: Any, path: list[str | int], buffers: list[tuple[list[str | int], str]]) -> Any:
    if isinstance(value, _BINARY):
        buffers.append((path, base64.b64encode(value).decode("ascii")))
        return None
    if isinstance(value, dict):
        return {str(key): _apart(item, [*path, str(key)], buffers) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_apart(item, [*path, i], buffers) for i, item in enumerate(value)]
    return value


def _json_for_script(value: object) -> str:
    """JSON that is safe inside `<script>`: ASCII, and no character that HTML could read as markup."""
    made = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return made.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _fill(template: str, parts: dict[str, str]) -> str:
    """Puts each part in its places in one pass: what a part contains is never read as a place."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)
