"""The component tree of a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import traitlets as t

from workbench.widgets.element import Element
from workbench.widgets.static_html import text

_STATIC_DEPTH = 2


class ComponentTree(Element):
    """Components and modules, searchable and folded; a click selects, the copy icon gives code.

    Attributes:
        nodes: in preorder, each ``{path, name, cls, depth, parameters, dtype, device, shape, kind}``
            with ``kind`` one of ``component``, ``module``, ``attention``, ``other``.
        variable: the name the model has in copied code.
        selected: path of the selected node; the browser changes it.
        marked: paths that carry a dot, for example those captured or patched.
    """

    _bundle: ClassVar[str] = "tree"
    _editable: ClassVar[frozenset[str]] = frozenset({"selected"})
    _page_width: ClassVar[str] = "minmax(0, 264px)"

    nodes = t.List(t.Dict()).tag(sync=True)
    variable = t.Unicode("model").tag(sync=True)
    selected = t.Unicode("").tag(sync=True)
    marked = t.List(t.Unicode()).tag(sync=True)

    @t.validate("selected")  # type: ignore[untyped-decorator]
    def _known_path(self, proposal: Mapping[str, Any]) -> str:
        path: str = proposal["value"]
        if path and all(node.get("path") != path for node in self.nodes):
            raise t.TraitError(f"no node has the path {path!r}")
        return path

    def __repr__(self) -> str:
        top = ", ".join(str(node.get("path")) for node in self.nodes if node.get("depth") == 0)
        return f"ComponentTree({top})"

    def fallback_html(self) -> str:
        """The first levels as nested lists that fold."""
        shown = [node for node in self.nodes if node.get("depth", 0) <= _STATIC_DEPTH]
        return f"<div>{_branches(shown, 0, len(shown))}</div>" if shown else "<p>No model.</p>"


def _branches(nodes: list[dict[str, Any]], start: int, end: int) -> str:
    made = []
    while start < end:
        depth = nodes[start].get("depth", 0)
        last = start + 1
        while last < end and nodes[last].get("depth", 0) > depth:
            last += 1
        label = _label(nodes[start])
        if last > start + 1:
            unfolded = " open" if depth == 0 else ""
            inner = _branches(nodes, start + 1, last)
            made.append(
                f"<details{unfolded} style='margin-left:1em'><summary>{label}</summary>{inner}</details>"
            )
        else:
            made.append(f"<div style='margin-left:2em'>{label}</div>")
        start = last
    return "".join(made)


def _label(node: Mapping[str, Any]) -> str:
    parameters = node.get("parameters") or 0
    counted = f" · {parameters:,}" if parameters else ""
    return f"<b>{text(node.get('name', ''))}</b> <small>{text(node.get('cls', ''))}{counted}</small>"
