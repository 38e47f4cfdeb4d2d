"""The step scrubber: every step of every run, side by side, with attention over it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import traitlets as t

from workbench.widgets.element import Element
from workbench.widgets.static_html import figure


class StepScrubber(Element):
    """Scrubs through runs in the browser alone; the kernel is never asked.

    Attributes:
        lanes: one run each, ``{label, frames: {kind: [PNG bytes a step]}, final: PNG bytes or None}``.
        kinds: which kinds of frame there are, in order.
        kind: the one shown.
        step: the step shown; the browser changes it.
        rows: for each step ``{step, timestep, sigma}``.
        curve: one number a step, drawn above the slider.
        words: word chips ``{text, index, special}`` to show while there are no attention maps.
        attention: empty, or ``{lane, layers, tokens, shape, scales, data}``: ``data`` is uint8 of ``shape``
            (layers, steps, tokens, height, width), a value is ``data / 255 * scales[layer][token]``.
        selected_tokens: indices of the words whose maps are summed and laid over the lane.
        layer: index of the layer shown.
        place: ``[x, y]`` of the place whose weights the words show, from 0 to 1 each way from the upper left
            corner; empty for none.
    """

    _bundle: ClassVar[str] = "scrubber"
    _editable: ClassVar[frozenset[str]] = frozenset({"step", "kind", "selected_tokens", "layer", "place"})
    _page_width: ClassVar[str] = "minmax(0, 2fr)"

    lanes = t.List(t.Dict()).tag(sync=True)
    kinds = t.List(t.Unicode()).tag(sync=True)
    kind = t.Unicode("").tag(sync=True)
    step = t.Int(0, min=0).tag(sync=True)
    rows = t.List(t.Dict()).tag(sync=True)
    curve = t.List(t.Float()).tag(sync=True)
    words = t.List(t.Dict()).tag(sync=True)
    attention = t.Dict().tag(sync=True)
    selected_tokens = t.List(t.Int()).tag(sync=True)
    layer = t.Int(0, min=0).tag(sync=True)
    place = t.List(t.Float(min=0.0, max=1.0)).tag(sync=True)

    @t.validate("curve")  # type: ignore[untyped-decorator]
    def _finite(self, proposal: Mapping[str, Any]) -> list[float]:
        values: list[float] = proposal["value"]
        if not all(math.isfinite(value) for value in values):
            raise t.TraitError("the values of curve must be finite; JSON has no NaN")
        return values

    @t.validate("place")  # type: ignore[untyped-decorator]
    def _two(self, proposal: Mapping[str, Any]) -> list[float]:
        value: list[float] = proposal["value"]
        if len(value) not in (0, 2):
            raise t.TraitError(f"place is [x, y] or empty; {value} is neither")
        return value

    @t.validate("attention")  # type: ignore[untyped-decorator]
    def _consistent(self, proposal: Mapping[str, Any]) -> dict[str, Any]:
        value: dict[str, Any] = proposal["value"]
        if value:
            _check_attention(value)
        return value

    def __repr__(self) -> str:
        labels = ", ".join(str(lane.get("label")) for lane in self.lanes)
        return f"StepScrubber({labels}; {len(self.rows)} steps)"

    def fallback_html(self) -> str:
        """Each lane's image at the step shown, or its last one."""
        if not self.lanes:
            return "<p>No steps yet.</p>"
        return (
            "<div>"
            + "".join(figure(str(lane.get("label", "")), self._image(lane)) for lane in self.lanes)
            + "</div>"
        )

    def _image(self, lane: Mapping[str, Any]) -> bytes | None:
        frames = (lane.get("frames") or {}).get(self.kind or next(iter(self.kinds), ""), [])
        if self.step < len(frames) and frames[self.step]:
            return bytes(frames[self.step])
        final = lane.get("final")
        return bytes(final) if final else None


def _check_attention(value: Mapping[str, Any]) -> None:
    """Says what does not fit, before a browser has to guess."""
    missing = {"layers", "tokens", "shape", "scales", "data"} - value.keys()
    if missing:
        raise t.TraitError(f"attention lacks {', '.join(sorted(missing))}")
    layers, steps, tokens, height, width = shape = tuple(value["shape"])
    if len(value["data"]) != math.prod(shape):
        raise t.TraitError(
            f"attention data has {len(value['data'])} bytes; shape {shape} needs {math.prod(shape)}"
        )
    if len(value["layers"]) != layers or len(value["tokens"]) != tokens:
        given = f"{len(value['layers'])} layers and {len(value['tokens'])} tokens"
        raise t.TraitError(f"attention names {given}; its shape says {layers} and {tokens}")
    scales = value["scales"]
    if len(scales) != layers or any(len(row) != tokens for row in scales):
        raise t.TraitError(f"attention scales must be {layers} rows of {tokens} numbers")
    if min(steps, height, width) < 1:
        raise t.TraitError(f"attention shape {shape} is empty")
