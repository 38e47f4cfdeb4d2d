"""Views made straight from a model or from records, and how a notebook shows those by themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from workbench.errors import InputError
from workbench.models.decoding import Decoder, is_image_run
from workbench.models.model import DiffusionModel
from workbench.models.outline import outline
from workbench.tracing.record import Record
from workbench.widgets import page
from workbench.widgets.element import Element
from workbench.widgets.lanes import change_curve, lane, step_rows
from workbench.widgets.overlay import overlay
from workbench.widgets.scrubber import StepScrubber
from workbench.widgets.tree import ComponentTree


def component_tree(model: DiffusionModel, variable: str = "model") -> ComponentTree:
    """Return a model's component tree.

    Args:
        model: the model.
        variable: its name in the code that is copied.
    """
    return ComponentTree(nodes=[node.__dict__ for node in outline(model)], variable=variable)


def step_scrubber(*records: Record) -> StepScrubber:
    """Return a scrubber through one or more runs of one model, side by side.

    Args:
        *records: the runs; attention is shown over the last that captured it.

    Raises:
        InputError: no record, or one that does not know its model.
    """
    if not records or not all(
        isinstance(record, Record) and isinstance(record.model, DiffusionModel) for record in records
    ):
        raise InputError("Give one or more records that a DiffusionModel made: wb.step_scrubber(record)")
    model = records[0].model
    assert isinstance(model, DiffusionModel)
    decoder = Decoder(model)
    lanes = [lane(_label(record, index), record, decoder) for index, record in enumerate(records)]
    kinds = [kind for kind in lanes[0]["frames"] if all(kind in each["frames"] for each in lanes)]
    attended = [index for index, record in enumerate(records) if record.attention and is_image_run(record)]
    maps: dict[str, Any] = {}
    if attended:
        shown = records[attended[-1]]
        maps = overlay(shown.attention, lane=attended[-1], size=shown.images[0].size)
    return StepScrubber(
        lanes=lanes,
        kinds=kinds,
        kind=kinds[0] if kinds else "",
        rows=step_rows(records[0]),
        curve=change_curve(records[0]),
        attention=maps,
    )


def save_html(what: Any, path: str | os.PathLike[str], *, title: str = "Workbench") -> Path:
    """Write a record, a view or rows of views to a page that scrubs without a kernel or a network.

    Args:
        what: a record, a list of records, a widget, or rows of widgets.
        path: the file to write.
        title: the page's title.

    Returns:
        The path written.
    """
    if isinstance(what, Record):
        return page.save_html(step_scrubber(what), path, title=title)
    if isinstance(what, (list, tuple)) and what and all(isinstance(each, Record) for each in what):
        return page.save_html(step_scrubber(*what), path, title=title)
    return page.save_html(what, path, title=title)


def show(value: DiffusionModel | Record, **options: Any) -> Any:
    """Return the mimebundle of a model's tree or a record's scrubber, for IPython's formatter."""
    view: Element = component_tree(value) if isinstance(value, DiffusionModel) else step_scrubber(value)
    return view._repr_mimebundle_(**options)


def _label(record: Record, index: int) -> str:
    prompt = record.spec.arguments.get("prompt")
    return prompt if isinstance(prompt, str) else f"run {index + 1}"
