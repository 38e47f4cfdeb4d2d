"""Which steps and branches something acts on."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from workbench.errors import InputError
from workbench.tracing.ledger import ALL, GUIDED, Row

Steps = int | slice | Iterable[int] | None


def normal(steps: Steps) -> tuple[int, ...] | slice | None:
    """Return steps in a plain, comparable form.

    Args:
        steps: a step, a range, a slice, a list; None means every step. Negative ones count from the end.

    Raises:
        InputError: something that is no step, or an empty choice.
    """
    if steps is None or isinstance(steps, slice):
        return steps
    try:
        chosen = tuple(operator.index(step) for step in (steps if isinstance(steps, Iterable) else (steps,)))
    except TypeError:
        raise InputError(
            f"steps={steps!r} does not name steps. Give a number, a range like range(0, 8), a list or None."
        ) from None
    if not chosen:
        raise InputError(f"steps={steps!r} is empty, so nothing would happen. Leave it out for every step.")
    return chosen


def covers(steps: tuple[int, ...] | slice | None, row: Row, total: int | None) -> bool:
    """Whether ``row`` lies in ``steps`` of a run of ``total`` steps.

    Raises:
        InputError: the run has no such step.
    """
    if steps is None:
        return True
    if total is None:
        _refuse_from_the_end(steps)
    if isinstance(steps, slice):
        return row.step in range(*steps.indices(total if total is not None else row.step + 1))
    if total is None:
        return row.step in steps
    for step in steps:
        if not -total <= step < total:
            raise InputError(f"The run has {total} steps (0 to {total - 1}); {step} is none of them.")
    return row.step in steps or row.step - total in steps


def branch_rows(row: Row, branch: str, size: int) -> list[tuple[str, slice]]:
    """Return each branch of this call that ``branch`` asks for, with its rows in a batch of ``size``.

    Raises:
        InputError: the scheduler's values have no branches to choose from.
    """
    if row.only is not None and branch not in (ALL, "both", GUIDED):
        raise InputError(
            "What the scheduler works on is of no branch, since guidance has joined them: "
            f"leave branch={branch!r} out."
        )
    wanted = row.branches if branch in (ALL, "both") else tuple(b for b in row.branches if b == branch)
    return [(each, row.rows(each, size)) for each in wanted]


def _refuse_from_the_end(steps: tuple[int, ...] | slice) -> None:
    """Refuse steps counted from an end that is not known yet."""
    named = (steps.start or 0, steps.stop or 0) if isinstance(steps, slice) else steps
    if any(step < 0 for step in named):
        raise InputError(
            f"steps={steps!r} counts from the end, which this run does not know before its last stage. "
            "Count from 0; the first stage's steps come first."
        )
