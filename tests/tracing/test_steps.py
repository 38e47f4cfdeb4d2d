import pytest

from workbench.errors import InputError
from workbench.tracing.ledger import Row
from workbench.tracing.steps import branch_rows, covers, normal


def row(step=0, branches=("uncond", "cond")):
    return Row(
        call=step, tick=step, step=step, timestep=500.0, sigma=1.0, branches=branches, component="unet"
    )


def chosen(steps, total=10):
    return [step for step in range(total) if covers(normal(steps), row(step), total)]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (None, list(range(10))),
        (3, [3]),
        (-1, [9]),
        (range(0, 3), [0, 1, 2]),
        (slice(2, None, 4), [2, 6]),
        (slice(-2, None), [8, 9]),
        ([1, -2], [1, 8]),
        ({4}, [4]),
    ],
)
def test_steps_are_chosen_by_number_range_slice_and_list(steps, expected):
    assert chosen(steps) == expected


@pytest.mark.parametrize("steps", ["3", 1.5, [0.5], [None], object()])
def test_what_names_no_steps_is_refused(steps):
    with pytest.raises(InputError, match="does not name steps"):
        normal(steps)


def test_no_steps_at_all_are_refused():
    with pytest.raises(InputError, match="is empty"):
        normal([])


@pytest.mark.parametrize("steps", [10, -11, [0, 50]])
def test_steps_the_run_does_not_have_are_refused(steps):
    with pytest.raises(InputError, match=r"has 10 steps \(0 to 9\)"):
        covers(normal(steps), row(), 10)


@pytest.mark.parametrize("steps", [-1, [0, -2], slice(-2, None), slice(0, -1)])
def test_steps_from_an_end_that_is_not_known_are_refused(steps):
    with pytest.raises(InputError, match="counts from the end"):
        covers(normal(steps), row(3), None)
    assert covers(normal([3, 5]), row(3), None)
    assert covers(normal(slice(2, None)), row(3), None)


def test_branches_are_equal_stretches_of_the_batch():
    assert branch_rows(row(), "all", 6) == [("uncond", slice(0, 3)), ("cond", slice(3, 6))]
    assert branch_rows(row(), "cond", 6) == [("cond", slice(3, 6))]
    assert branch_rows(row(branches=("cond",)), "uncond", 6) == []
    with pytest.raises(InputError, match="5 rows does not divide"):
        branch_rows(row(), "cond", 5)
