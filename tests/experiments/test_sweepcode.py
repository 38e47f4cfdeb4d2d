"""Sweeps as scripts: every cell's image is the one that the sweep gives."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.errors import InputError, UnknownNameError
from workbench.experiments.experiment import Experiment
from workbench.experiments.measure import metric
from workbench.experiments.measured import RunMetric
from workbench.experiments.sweep import Sweep
from workbench.interventions.corrupt import Corrupt
from workbench.models.model import DiffusionModel

REPOSITORY = Path(__file__).parents[2]
PAIR = Experiment(
    model="shapes-unet",
    source="a {colour} circle",
    target="a blue circle",
    num_inference_steps=3,
    guidance_scale=2.0,
    source_from=1,
)
AXES = {
    "site": ["unet.mid_block", "unet.up_blocks.2"],
    "step": [1, 2],
    "colour": ["red", "green"],
    "seed": [3, 4],
}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel("shapes-unet")


def run(folder, *arguments, workbench=True):
    hidden = "" if workbench else "sys.modules['workbench'] = None; "
    code = f"import runpy, sys; {hidden}sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_standalone_script_makes_each_cell(model, tmp_path):
    sweep = PAIR.sweep(AXES, controls=False)
    sweep.export(tmp_path / "script.py", model=model)
    run(tmp_path, "script.py", "--out", tmp_path / "cells", workbench=False)
    with (tmp_path / "cells" / "cells.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(sweep.cells) == len(list((tmp_path / "cells").glob("*.png"))) == 16
    for point, row in zip(sweep.points, sorted(table, key=_order(sweep)), strict=True):
        assert {name: row[name] for name in point} == {name: str(value) for name, value in point.items()}
    for index in (0, 5, 15):
        cell = sweep.run_at(model, **sweep.points[index])
        name = next(row["image"] for row in table if _order(sweep)(row) == index)
        assert Image.open(tmp_path / "cells" / name).tobytes() == cell.images[0].tobytes()
    found = sweep.measure(model)
    mine = [float(row["towards"]) for row in sorted(table, key=_order(sweep))]
    of = {each.cell: each.values["towards"] for each in found if each.kind == "cell"}
    assert np.allclose(mine, [of[index] for index in range(16)], atol=0.02)


def test_standalone_script_of_a_causal_trace(model, tmp_path):
    corrupt = [Corrupt(seed=2, strength=1.0, steps=slice(0, 2))]
    axes = {"site": ["unet.up_blocks.1.attentions.0"], "step": [1, 2], "colour": ["blue"], "seed": [3]}
    sweep = Sweep(PAIR, axes, corrupt=corrupt, controls=False)
    sweep.export(tmp_path / "script.py", model=model)
    run(tmp_path, "script.py", "--out", tmp_path / "cells", workbench=False)
    with (tmp_path / "cells" / "cells.csv").open() as file:
        table = list(csv.DictReader(file))
    plain = model.record(PAIR.target, seed=3, num_inference_steps=3, guidance_scale=2.0).images[0].tobytes()
    for row, point, result in zip(table, sweep.points, sweep.measure(model), strict=True):
        image = Image.open(tmp_path / "cells" / row["image"]).tobytes()
        assert image == sweep.run_at(model, **point).images[0].tobytes() != plain
        assert float(row["towards"]) == pytest.approx(result.values["towards"], abs=0.02)


def _order(sweep):
    names = [tuple(str(value) for value in point.values()) for point in sweep.points]
    return lambda row: names.index(tuple(row[name] for name in sweep.axes))


def test_workbench_script_is_the_sweep(model, tmp_path):
    pytest.importorskip("xarray")
    axes = {**AXES, "colour": ["red"], "site": ["unet.mid_block"]}
    corrupt = [Corrupt(seed=2, strength=1.0, mask=torch.ones(24, 1), site="unet.conv_in")]
    measured = ["towards", "psnr", metric("shape", wanted="circle")]
    sweep = Sweep(PAIR, axes, window="half", metrics=measured, corrupt=corrupt)
    sweep.export(tmp_path / "script.py", "workbench")
    run(tmp_path, "script.py")
    again = sweep.load(tmp_path / "sweep")
    assert np.isfinite(again.towards.values).all()
    assert again.identical(sweep.run(model, tmp_path / "sweep"))
    assert (tmp_path / "sweep.csv").is_file()


def test_standalone_script_measures_what_the_sweep_does(model, tmp_path):
    asked = ["pixel", RunMetric("ratio", metric("psnr", to="source")), "ssim", "towards"]
    axes = {"site": ["unet.mid_block"], "step": [1], "colour": ["red"], "seed": [3]}
    sweep = Sweep(PAIR, axes, metrics=asked, controls=False)
    sweep.export(tmp_path / "script.py", model=model)
    run(tmp_path, "script.py", "--out", tmp_path / "cells", workbench=False)
    with (tmp_path / "cells" / "cells.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert list(row) == ["site", "step", "colour", "seed", "pixel", "ratio", "ssim", "towards", "image"]
    (result,) = sweep.measure(model)
    for name, value in result.values.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("name", ["a.py", "b.ipynb", "c.py"])
def test_a_sweeps_script_opens_again_as_its_experiment(model, tmp_path, name):
    axes = {"site": ["unet.mid_block"], "step": [1], "colour": ["red"], "seed": [3]}
    kind = "workbench" if name == "c.py" else "standalone"
    PAIR.sweep(axes).export(tmp_path / name, kind, model=model)
    assert Experiment.load(tmp_path / name) == PAIR


def test_what_a_script_cannot_do_is_refused_by_name(model, tmp_path):
    axes = {"site": ["unet.mid_block"], "step": [1], "seed": [1], "colour": ["red"]}
    with pytest.raises(InputError, match="samples"):
        PAIR.sweep(axes, corrupt=[Corrupt(samples=0)]).export(tmp_path / "x.py", model=model)
    with pytest.raises(InputError, match="functions"):
        PAIR.sweep(axes, metrics=[lambda *_: 0.0]).export(tmp_path / "x.py", "workbench")
    measured = ["towards_latents", metric("shape", wanted="circle"), "ssim"]
    with pytest.raises(InputError, match="towards_latents, shape: with metrics= choose"):
        PAIR.sweep(axes, metrics=measured).export(tmp_path / "x.py", model=model)
    with pytest.raises(UnknownNameError, match="standalone"):
        PAIR.sweep(axes).export(tmp_path / "x.py", "alone")
    with pytest.raises(InputError, match="ipynb"):
        PAIR.sweep(axes).export(tmp_path / "x.txt", "workbench")
    assert not list(tmp_path.iterdir())
