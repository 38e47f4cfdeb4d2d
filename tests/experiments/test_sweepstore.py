"""A sweep that dies at any point: what was committed is there, once, and the rest is done by the next."""

import json
import random
from functools import partial

import pytest

from tests import tiny
from tests.killing import finishes
from workbench.errors import BusyError
from workbench.experiments.experiment import Experiment
from workbench.experiments.sweep import Sweep
from workbench.experiments.sweepstore import SweepStore
from workbench.models.model import DiffusionModel
from workbench.tracing.storage.disk import locked

PAIR = Experiment(source="a red circle", target="a blue square", num_inference_steps=2)
AXES = {"site": ["unet.mid_block", "unet.down_blocks.0:output[0]"], "step": range(2), "seed": [0]}
BATCHES = 6
"""Two for each step, and two of controls."""

POINTS, SOME = 100, 5


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def sweep():
    return Sweep(PAIR, AXES, metrics=["towards_latents"], rows=2)


@pytest.fixture(scope="module")
def uninterrupted(model, tmp_path_factory):
    # What is imported at first use is opened here, and not in the processes that are counted.
    sweep().run(model)
    folder = tmp_path_factory.mktemp("whole")
    ended, operations = finishes(partial(sweep().measure, model, folder))
    assert ended
    assert committed(folder).keys() == set(range(BATCHES))
    return sweep().load(folder), operations


def committed(folder):
    """Return what a folder holds, by the number of the batch: the file it is in, and its bytes."""
    store = SweepStore(folder, sweep().key, sweep().definition)
    if not (folder / "sweep.json").exists():
        return {}
    paths = {number: folder / f"batch-{number:06}.json" for number in store.read()}
    return {number: (path.stat().st_ino, path.read_bytes()) for number, path in paths.items()}


def survive(model, root, uninterrupted, points, seed):
    """Kill a sweep at random points and go on each time; return how many batches each death left."""
    whole, operations = uninterrupted
    rng, left = random.Random(seed), []
    for index in range(points):
        folder = root / str(index)
        work = partial(sweep().measure, model, folder)
        ended, _ = finishes(work, rng.randrange(operations))
        assert not ended
        before = committed(folder)
        ended, _ = finishes(work)
        assert ended
        after = committed(folder)
        assert after.keys() == set(range(BATCHES))
        assert {number: after[number] for number in before} == before
        trials = [
            (each["kind"], each["cell"])
            for _, content in after.values()
            for each in json.loads(content)["results"]
        ]
        assert len(trials) == len(set(trials)) == 10
        assert sorted(item.name for item in folder.iterdir() if item.name.startswith(".")) == []
        assert sweep().load(folder).identical(whole)
        left.append(len(before))
    return left


def test_a_sweep_that_was_killed_goes_on_where_it_was(model, tmp_path, uninterrupted):
    left = survive(model, tmp_path, uninterrupted, SOME, seed=3)
    # Control: the deaths were not all before the first or after the last batch.
    assert any(0 < count < BATCHES for count in left)


@pytest.mark.soak
def test_a_sweep_that_was_killed_at_many_points_goes_on_where_it_was(model, tmp_path, uninterrupted):
    left = survive(model, tmp_path, uninterrupted, POINTS, seed=0)
    assert set(left) >= set(range(BATCHES))


def test_what_is_torn_does_not_count(model, tmp_path):
    found = sweep().run(model, tmp_path)
    batch = tmp_path / "batch-000002.json"
    batch.write_bytes(batch.read_bytes()[:40])
    (tmp_path / ".batch-000004.json.0123abcd.partial").write_text("{")
    (tmp_path / "batch-000003.json").rename(tmp_path / "batch-000009.json")
    assert sorted(committed(tmp_path)) == [0, 1, 4, 5]
    assert sweep().run(model, tmp_path).identical(found)
    assert not list(tmp_path.glob(".*"))


def test_two_writers_of_one_folder_are_one_too_many(model, tmp_path):
    sweep().measure(model, tmp_path)
    with locked(tmp_path, wait=False), pytest.raises(BusyError):
        sweep().measure(model, tmp_path)
