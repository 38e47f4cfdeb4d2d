"""Which steps a cell covers: here, and by the same rule in the front end's ``patch_window.ts``."""

import re
from pathlib import Path

import pytest

from workbench.errors import UnknownNameError
from workbench.experiments.windows import WINDOWS, window

FRONT_END = Path(__file__).parents[2] / "extensions" / "widgets" / "src" / "patch_window.ts"


@pytest.mark.parametrize(
    ("name", "step", "steps", "covered"),
    [
        ("1", 7, 20, range(7, 8)),
        ("quarter", 7, 20, range(5, 10)),
        ("quarter", 0, 20, range(3)),
        ("quarter", 19, 20, range(17, 20)),
        ("half", 10, 20, range(6, 16)),
        ("half", 0, 20, range(6)),
        ("half", 19, 20, range(15, 20)),
        ("to here", 7, 20, range(8)),
        ("from here", 7, 20, range(7, 20)),
        # Half a step rounds up, as Math.round does: 10 / 4 and 18 / 4, 5 / 2 and 1 / 2.
        ("quarter", 5, 10, range(4, 7)),
        ("quarter", 9, 18, range(7, 12)),
        ("half", 2, 5, range(1, 4)),
        ("half", 0, 1, range(1)),
        ("quarter", 1, 2, range(1, 2)),
        ("quarter", 0, 1, range(1)),
    ],
)
def test_window_covers(name, step, steps, covered):
    assert window(name, step, steps) == tuple(covered)


@pytest.mark.parametrize("name", WINDOWS)
def test_every_window_covers_its_own_step_without_gaps_and_stays_inside(name):
    for steps in (1, 2, 3, 7, 20, 50):
        for step in range(steps):
            covered = window(name, step, steps)
            assert step in covered
            assert covered == tuple(range(covered[0], covered[-1] + 1))
            assert 0 <= covered[0] <= covered[-1] < steps


def test_unknown_window_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'quarter'"):
        window("quater", 0, 20)


def test_front_end_knows_the_same_windows():
    listed = re.search(r"WINDOWS = \[(.*?)\]", FRONT_END.read_text(encoding="utf-8"))
    assert tuple(re.findall(r'"(.*?)"', listed[1])) == WINDOWS
