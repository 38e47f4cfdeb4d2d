"""Marks of what a block changed by hand: code that no record can run again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from workbench.errors import InputError
from workbench.tracing.ledger import Row
from workbench.tracing.record import Record
from workbench.tracing.sites import Site

KIND = "by hand"


def is_mark(intervention: Any) -> bool:
    """Whether an entry of a run's interventions only says that something was changed by hand."""
    return isinstance(intervention, Mapping) and intervention.get("kind") == KIND


def note(record: Record, site: Site, row: Row | None) -> None:
    """Note in a run's spec that a value was put at a site; ``row`` is None outside the steps."""
    rest = tuple(each for each in record.spec.interventions if not is_mark(each))
    marks = [each for each in record.spec.interventions if is_mark(each)]
    mark = marks[0] if marks else {"sites": [], "steps": []}
    sites = list(dict.fromkeys([*mark["sites"], str(site)]))
    steps = list(dict.fromkeys([*mark["steps"], None if row is None else row.step]))
    noted = {"kind": KIND, "sites": sites, "steps": steps}
    record.spec = record.spec.model_copy(update={"interventions": (*rest, noted)})


def check_repeatable(marks: Iterable[Mapping[str, Any]], step: int) -> None:
    """Refuse to run steps again in which something was changed by hand.

    Args:
        marks: the run's, see `is_mark`.
        step: the first step that is computed anew.

    Raises:
        InputError: with the sites and steps, and what can be done.
    """
    for mark in marks:
        lost = [each for each in mark["steps"] if each is None or each >= step]
        if not lost:
            continue
        told = ", ".join("outside the steps" if each is None else f"step {each}" for each in lost)
        last = max((each for each in lost if each is not None), default=None)
        later = "" if last is None or None in lost else f"Fork at step {last + 1} or later, or say"
        raise InputError(
            f"This run's block put values of its own at {', '.join(mark['sites'])} ({told}), and a fork from "
            f"step {step} would leave them out. {later or 'Say'} interventions=[…], what the fork has in "
            "place of them: an empty list is nothing. To repeat changes, give them as data: model.record(…, "
            "interventions=[wb.Replace(…)])."
        )
