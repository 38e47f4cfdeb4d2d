"""Experiments drawn at random make the same bytes here and as scripts of either kind in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.experiments.generated import KINDS, SHIPPED, experiment
from workbench.experiments.scripts import workbench_code
from workbench.experiments.standalone import standalone_code
from workbench.models.model import DiffusionModel

REPOSITORY = Path(__file__).parents[2]
COUNT = max(30, 2 * len(KINDS) * len(SHIPPED))
FEW = (4, 10, 16, 19, 24, 31)
STANDALONE = """
import pathlib, runpy, sys
sys.modules["workbench"] = None
for folder in sys.argv[1:]:
    sys.argv = [f"{folder}/script.py", "--out", f"{folder}/image.png"]
    runpy.run_path(sys.argv[0], run_name="__main__")
assert not [name for name in sys.modules if name.startswith("workbench.")]
"""
WORKBENCH = """
import pathlib, runpy, sys
def save(branches, out, stem):
    for number, branch in enumerate(branches):
        branch.record.images[0].save(out / f"{stem}-{number}.png")
        save(branch.branches, out, f"{stem}-{number}")
for folder in map(pathlib.Path, sys.argv[1:]):
    names = runpy.run_path(str(folder / "script.py"))
    outcome = names.get("outcome")
    patched = names["patched"] if outcome is None else outcome.patched
    patched.images[0].save(folder / "image.png")
    save([] if outcome is None else outcome.branches, folder, "image-branch")
"""


@pytest.fixture(scope="module")
def models():
    return {name: DiffusionModel(name) for name in SHIPPED}


@pytest.mark.parametrize(
    "numbers",
    [FEW, *(pytest.param((each,), marks=pytest.mark.soak) for each in range(COUNT))],
    ids=lambda numbers: "-".join(map(str, numbers)),
)
def test_both_scripts_make_the_experiments_bytes(models, tmp_path, numbers):
    expected, folders = {}, {STANDALONE: [], WORKBENCH: []}
    for number in numbers:
        drawn = experiment(number)
        outcome = drawn.run(models[drawn.model], allow_code=True)
        assert not torch.equal(outcome.patched.latents, outcome.target.latents)
        images = {"image": outcome.patched.images[0], **_named(outcome.branches, "image-branch")}
        codes = {
            STANDALONE: standalone_code(drawn, outcome.source, outcome.target, allow_code=True),
            WORKBENCH: workbench_code(drawn, allow_code=True),
        }
        for kind, (runner, code) in enumerate(codes.items()):
            folder = tmp_path / f"{number}-{kind}"
            folder.mkdir()
            (folder / "script.py").write_text(code, encoding="utf-8")
            folders[runner].append(folder)
            expected[folder] = {name: image.tobytes() for name, image in images.items()}
    for runner, its in folders.items():
        _run(runner, *its)
        for folder in its:
            found = {path.stem: Image.open(path).tobytes() for path in folder.glob("*.png")}
            assert found == expected[folder], folder.name


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
