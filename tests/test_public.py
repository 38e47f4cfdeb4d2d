"""The public surface: quick to import, complete, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import workbench
from workbench.errors import UnknownNameError

REPOSITORY = Path(__file__).parents[1]


def fresh(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_loads_nothing_heavy():
    heavy = {"torch", "diffusers", "transformers", "ipywidgets", "anywidget", "plotly", "scipy", "numpy"}
    loaded = fresh("import sys, workbench; dir(workbench); print(*sys.modules)")
    assert "workbench" in loaded
    assert not heavy & set(loaded)
    # Control: the same question after the first use of a name.
    assert "torch" in fresh("import sys, workbench; workbench.Patch; print(*sys.modules)")


def test_every_public_name_resolves():
    for name in workbench.__all__:
        assert getattr(workbench, name) is not None, name
    assert workbench.Patch.__module__ == "workbench.interventions.patch"
    assert workbench.zoo.__name__ == "workbench.zoo"


def test_nothing_that_resolves_is_missing_from_all():
    assert sorted(workbench.__all__) == workbench.__dir__()
    assert set(workbench._HOMES) | {"__version__"} == set(workbench.__all__)
    assert len(set(workbench.__all__)) == len(workbench.__all__)


def test_type_checkers_see_the_same_names():
    text = Path(workbench.__file__).read_text(encoding="utf-8")
    seen = {
        line.rsplit(" as ", 1)[1]
        for line in text.splitlines()
        if line.startswith("    from ") and " as " in line
    }
    assert seen == set(workbench.__all__) - {"__version__", "errors", "zoo"}


def test_unknown_name_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'Workbench'"):
        workbench.Workbanch  # noqa: B018
    assert not hasattr(workbench, "Pacth")
