"""What the scrubber shows of a run."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from PIL import Image

from tests import tiny
from workbench.errors import RunStopped
from workbench.models.decoding import Decoder
from workbench.models.model import DiffusionModel
from workbench.widgets import lanes
from workbench.widgets.lanes import change_curve, lane, step_rows


def recorded(name="sd1", **asked):
    case = tiny.CASES[name]
    model = DiffusionModel(case.build())
    return model.record(**{**case.arguments, **asked}, seed=0), Decoder(model)


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_lane_has_a_picture_of_each_kind_and_step(name):
    record, decoder = recorded(name)
    made = lane("source", record, decoder)
    assert made["label"] == "source"
    assert list(made["frames"]) == ["predicted x₀", "latents", "noise"]
    for frames in made["frames"].values():
        assert len(frames) == 4
        assert len(set(frames)) == 4
    final = Image.open(BytesIO(made["final"]))
    assert final.tobytes() == record.images[0].tobytes()
    last = Image.open(BytesIO(made["frames"]["predicted x₀"][-1]))
    assert last.size == final.size


def test_past_the_budget_the_lane_says_linear(monkeypatch):
    monkeypatch.setattr(lanes, "DECODING_BUDGET", 0.0)
    assert next(iter(lane("x", *recorded())["frames"])) == "predicted x₀ (linear)"


def test_video_has_no_pictures_of_its_own():
    record, decoder = recorded("wan")
    made = lane("x", record, decoder)
    assert made["final"] is None
    assert "predicted x₀" not in made["frames"]


def test_stopped_run_has_what_it_came_to():
    class Stop:
        def started(self, row):
            if row.step == 2:
                raise RunStopped("enough")

        def ticked(self, tick, latents):
            pass

    model = DiffusionModel(tiny.sd1())
    with pytest.raises(RunStopped) as stopped:
        model.record("a red circle", num_inference_steps=4, seed=0, listener=Stop())
    made = lane("stopped", stopped.value.record, Decoder(model))
    assert {kind: len(frames) for kind, frames in made["frames"].items()} == {"latents": 2, "noise": 2}
    assert made["final"] is None


def test_rows_are_the_ledgers_one_a_step():
    model = DiffusionModel(tiny.sd1(HeunDiscreteScheduler))
    record = model.record("a red circle", num_inference_steps=3, seed=0)
    assert len(record.ledger) == 5
    rows = step_rows(record)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["timestep"] for row in rows] == [record.ledger.at(step)[0].timestep for step in range(3)]
    assert len(change_curve(record)) == 3
    assert len(lane("x", record, Decoder(model))["frames"]["latents"]) == 3


def test_curve_is_how_far_each_step_went():
    record, _ = recorded()
    points = [record.initial, *record.latents]
    expected = [float((b - a).pow(2).mean().sqrt()) for a, b in pairwise(points)]
    assert change_curve(record) == pytest.approx(expected)
    record.ticks[1]["latents"] = record.ticks[0]["latents"]
    assert change_curve(record)[1] == 0.0
    record.initial = None
    assert change_curve(record) == []


def test_latents_are_those_after_the_step():
    record, decoder = recorded("sd1", num_inference_steps=2)
    before = lane("x", record, decoder)["frames"]["latents"]
    record.ticks[1]["latents"] = torch.zeros_like(record.ticks[1]["latents"])
    after = lane("x", record, decoder)["frames"]["latents"]
    assert before[0] == after[0]
    assert before[1] != after[1]
