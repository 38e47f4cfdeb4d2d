"""The layer × step patch map."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import traitlets as t
from PIL import Image, ImageDraw
from pydantic import Field

from workbench.experiments.windows import WINDOWS
from workbench.widgets.colour import coloured
from workbench.widgets.element import Element, Message

Index = Annotated[int, Field(ge=0)]


class Cell(Message):
    """A cell was clicked."""

    kind: Literal["cell"]
    row: Index
    column: Index


class Fill(Message):
    """Compute every cell."""

    kind: Literal["fill"]


class Stop(Message):
    """Stop filling."""

    kind: Literal["stop"]


class Window(Message):
    """Another window of steps was chosen."""

    kind: Literal["window"]
    value: Literal["1", "quarter", "half", "to here", "from here"]


class PatchMap(Element):
    """Each cell is the effect of one patch; a click computes it, hovering reads it.

    Attributes:
        sites: the rows, from the first layer to the last.
        steps: number of columns.
        values: float32 (sites, steps) in C order, NaN where nothing was computed; see :meth:`show`.
        metric: what a value measures.
        noise_floor: what chance alone gives, drawn on the legend; ``None`` if it is not known.
        limit: the value at the end of the colours; 0 fits the values.
        signed: whether values have a sign; colours then diverge around zero.
        window: which steps a cell covers, see `workbench.experiments.windows`.
        selected: ``[row, column]`` or ``[]``; the browser changes it.
        busy: ``[row, column]`` of the cell being computed, or ``[]``.
        status: ``idle`` or ``running`` (filling).
        progress: ``{done, of}`` while filling.
        source_label: the prompt that activations come from.
        target_label: the prompt they are put into.
    """

    _bundle: ClassVar[str] = "patch_map"
    _messages: ClassVar = {"cell": Cell, "fill": Fill, "stop": Stop, "window": Window}
    _editable: ClassVar[frozenset[str]] = frozenset({"selected", "window"})
    _page_width: ClassVar[str] = "minmax(0, 3fr)"

    sites = t.List(t.Unicode()).tag(sync=True)
    steps = t.Int(0, min=0).tag(sync=True)
    values = t.Bytes(b"").tag(sync=True)
    metric = t.Unicode("").tag(sync=True)
    noise_floor = t.Float(None, allow_none=True).tag(sync=True)
    limit = t.Float(0.0, min=0.0).tag(sync=True)
    signed = t.Bool(False).tag(sync=True)
    window = t.Enum(WINDOWS, "quarter").tag(sync=True)
    selected = t.List(t.Int(min=0), maxlen=2).tag(sync=True)
    busy = t.List(t.Int(min=0), maxlen=2).tag(sync=True)
    status = t.Enum(["idle", "running"], "idle").tag(sync=True)
    progress = t.Dict().tag(sync=True)
    source_label = t.Unicode("").tag(sync=True)
    target_label = t.Unicode("").tag(sync=True)

    @t.validate("selected", "busy")  # type: ignore[untyped-decorator]
    def _inside(self, proposal: Mapping[str, Any]) -> list[int]:
        cell: list[int] = proposal["value"]
        if cell and (len(cell) != 2 or cell[0] >= len(self.sites) or cell[1] >= self.steps):
            raise t.TraitError(f"no cell {cell} in a map of {len(self.sites)} sites and {self.steps} steps")
        return cell

    def _refusal(self, message: Message) -> str:
        if isinstance(message, Cell) and (message.row >= len(self.sites) or message.column >= self.steps):
            return f"no cell ({message.row}, {message.column}) in this map"
        return ""

    def show(self, values: np.ndarray[Any, Any]) -> None:
        """Shows an array (sites, steps); NaN cells are drawn as not computed."""
        self.values = np.ascontiguousarray(values, dtype="<f4").tobytes()

    def array(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        """The values as an array (sites, steps), NaN where nothing was computed."""
        shape = (len(self.sites), self.steps)
        if len(self.values) != 4 * shape[0] * shape[1]:
            return np.full(shape, np.nan, dtype=np.float32)
        return np.frombuffer(self.values, dtype="<f4").reshape(shape).astype(np.float32)

    def __repr__(self) -> str:
        done = int(np.isfinite(self.array()).sum())
        return f"PatchMap({len(self.sites)} sites × {self.steps} steps, {done} computed)"

    def _fallback(self) -> dict[str, object]:
        return (
            {"image/png": self.picture()} if self.sites and self.steps else {"text/html": "<p>No sites.</p>"}
        )

    def picture(self) -> bytes:
        """The map as a PNG with the names of its sites, for where no script runs."""
        cell, margin = 14, 8
        values = self.array()
        height, width = values.shape
        pixels = coloured(values, limit=self.limit, signed=self.signed)
        cells = Image.fromarray(pixels).resize((width * cell, height * cell), Image.Resampling.NEAREST)
        names = max(int(ImageDraw.Draw(cells).textlength(site)) for site in self.sites)
        page = Image.new("RGB", (names + 3 * margin + cells.width, cells.height + 2 * margin), "white")
        page.paste(cells, (names + 2 * margin, margin))
        pen = ImageDraw.Draw(page)
        for row, site in enumerate(self.sites):
            pen.text((margin + names, margin + (row + 0.5) * cell), site, fill="#555", anchor="rm")
        stream = io.BytesIO()
        page.save(stream, format="PNG")
        return stream.getvalue()
