"""The steps that one cell of a patch map covers."""

from __future__ import annotations

from workbench.errors import UnknownNameError, nearest

WINDOWS = ("1", "quarter", "half", "to here", "from here")


def window(name: str, step: int, steps: int) -> tuple[int, ...]:
    """Return the steps that the cell at ``step`` covers in a run of ``steps``.

    Args:
        name: ``"1"`` is the step alone; ``"quarter"`` and ``"half"`` are that share of the run around
            it, cut at the ends; ``"to here"`` is everything up to and with it, ``"from here"`` it and all
            after.
        step: the cell's column.
        steps: how many the run has.

    Raises:
        UnknownNameError: no such window.
    """
    if name not in WINDOWS:
        raise UnknownNameError(f"No window {name!r}.{nearest(name, WINDOWS)}")
    if name == "to here":
        return tuple(range(step + 1))
    if name == "from here":
        return tuple(range(step, steps))
    share = {"quarter": 4, "half": 2}.get(name)
    # Not round(), which rounds halves to even: the front end draws the same window.
    width = max(1, int(steps / share + 0.5)) if share else 1
    first = step - (width - 1) // 2
    return tuple(range(max(0, first), min(steps, first + width)))
