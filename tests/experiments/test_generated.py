"""Experiments drawn at random make the same bytes here and as scripts of either kind in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.experiments.generated import KINDS, PLACES, experiment
from workbench import zoo
from workbench.experiments.scripts import workbench_code
from workbench.experiments.standalone import standalone_code
from workbench.models.model import DiffusionModel

REPOSITORY = Path(__file__).parents[2]
SHIPPED = [name for name in PLACES if name in zoo.models()]
COUNT = 2 * len(KINDS) * len(PLACES)
FEW = (4, 7, 10, 15, 16, 18)
STANDALONE = """
import runpy, sys
sys.modules["workbench"] = None
sys.argv = [sys.argv[1], "--out", sys.argv[2]]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not [name for name in sys.modules if name.startswith("workbench.")]
"""
WORKBENCH = """
import pathlib, runpy, sys
names = runpy.run_path(sys.argv[1])
outcome, out = names.get("outcome"), pathlib.Path(sys.argv[2])
patched = names["patched"] if outcome is None else outcome.patched
patched.images[0].save(out)
def save(branches, stem):
    for number, branch in enumerate(branches):
        branch.record.images[0].save(out.with_name(f"{stem}-{number}.png"))
        save(branch.branches, f"{stem}-{number}")
save([] if outcome is None else outcome.branches, f"{out.stem}-branch")
"""


@pytest.fixture(scope="module")
def models():
    return {name: DiffusionModel(name) for name in SHIPPED}


@pytest.mark.parametrize(
    "number", [*FEW, *(pytest.param(each, marks=pytest.mark.soak) for each in range(COUNT))]
)
def test_both_scripts_make_the_experiment_s_bytes(models, tmp_path, number):
    drawn = experiment(number)
    outcome = drawn.run(models[drawn.model], allow_code=True)
    expected = {"image": outcome.patched.images[0], **_named(outcome.branches, "image-branch")}
    assert expected["image"].tobytes() != outcome.target.images[0].tobytes()
    codes = {
        STANDALONE: standalone_code(drawn, outcome.source, outcome.target, allow_code=True),
        WORKBENCH: workbench_code(drawn, allow_code=True),
    }
    for number, (runner, code) in enumerate(codes.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "script.py").write_text(code, encoding="utf-8")
        _run(runner, folder / "script.py", folder / "image.png")
        found = {path.stem: Image.open(path).tobytes() for path in folder.glob("*.png")}
        assert found == {name: image.tobytes() for name, image in expected.items()}


def _named(branches, stem):
    found = {}
    for number, branch in enumerate(branches):
        name = f"{stem}-{number}"
        found |= {name: branch.record.images[0], **_named(branch.branches, name)}
    return found


def _run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
