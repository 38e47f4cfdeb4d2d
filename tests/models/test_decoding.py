"""Latents become the pipeline's own pictures, or none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny
from workbench.models.decoding import Decoder, fit_colours, is_image_run, paint, predicted
from workbench.models.model import DiffusionModel


def recorded(name, **arguments):
    case = tiny.CASES[name]
    model = DiffusionModel(case.build())
    return Decoder(model), model.record(**{**case.arguments, **arguments}, seed=0)


def furthest(first, second):
    return int(np.abs(np.asarray(first, np.int16) - np.asarray(second, np.int16)).max())


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_final_latents_become_the_runs_image(name):
    decoder, record = recorded(name)
    assert decoder.trusts(record)
    assert not decoder.refused
    decoded = decoder.decode(record.latents[-1], record.images[0].size)
    assert len(decoded) == 1
    assert furthest(decoded[0], record.images[0]) <= 1
    first = decoder.decode(record.latents[0], record.images[0].size)[0]
    assert furthest(first, record.images[0]) > 3
    assert decoder.seconds > 0


@pytest.mark.parametrize("name", ["sd1", "flux"])
def test_predicted_pictures_end_with_the_image(name):
    decoder, record = recorded(name)
    pictures, decoded = predicted(decoder, record, budget=60.0)
    assert decoded
    assert len(pictures) == 4
    assert furthest(pictures[-1], record.images[0]) <= 1
    assert furthest(pictures[0], record.images[0]) > 3


def test_past_the_budget_colours_are_a_linear_map():
    decoder, record = recorded("sd1")
    pictures, decoded = predicted(decoder, record, budget=0.0)
    assert not decoded
    assert [each.size for each in pictures] == [(8, 8)] * 4


def test_video_is_refused():
    decoder, record = recorded("wan")
    assert not decoder.trusts(record)
    assert decoder.refused
    assert predicted(decoder, record, budget=60.0) is None
    assert not is_image_run(record)


def test_pixels_are_pictures_as_they_are():
    decoder, record = recorded("ddpm")
    assert decoder.trusts(record)
    pictures, decoded = predicted(decoder, record, budget=60.0)
    assert decoded
    assert len(pictures) == record.ledger.steps
    last = ((record.pred_x0[-1][0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(pictures[-1]), last)


def test_other_outputs_are_no_image_run():
    assert not is_image_run(recorded("sd1", output_type="np", num_inference_steps=1)[1])
    assert not is_image_run(recorded("sd1", output_type="latent", num_inference_steps=1)[1])


def test_fitted_colours_give_back_a_linear_picture():
    draw = torch.Generator().manual_seed(0)
    latents = torch.rand(4, 6, 5, generator=draw)
    weights = torch.rand(5, 3, generator=draw) / 5
    image = paint(latents, weights)
    assert image.size == (5, 6)
    found = fit_colours(latents, image)
    assert found.shape == (5, 3)
    assert torch.allclose(found, weights, atol=0.02)
    assert furthest(paint(latents, found), image) <= 2
    assert furthest(paint(latents, weights.flip(1)), image) > 2


def test_painted_pictures_stay_in_range():
    shown = paint(torch.tensor([[[-9.0, 9.0]]]), torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.5, 0.5]]))
    assert shown.tobytes() == Image.fromarray(np.array([[[0] * 3, [255] * 3]], np.uint8)).tobytes()
