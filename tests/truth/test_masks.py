"""Overlap of masks."""

import numpy as np
import pytest

from workbench.experiments.metrics import iou
from workbench.truth.__main__ import circle_prompts
from workbench.truth.masks import largest

BOX = np.zeros((4, 6), bool)
BOX[1:3, 1:4] = True


def test_iou():
    shifted = np.roll(BOX, 1, axis=1)
    assert iou(BOX, BOX) == 1.0
    assert iou(BOX, ~BOX) == 0.0
    assert iou(BOX, shifted) == pytest.approx(4 / 8)
    assert iou(BOX, np.ones_like(BOX)) == pytest.approx(6 / 24)
    assert iou(BOX & False, BOX & False) == 0.0


def test_largest_takes_as_many_as_asked():
    values = np.arange(24.0).reshape(4, 6)
    assert np.flatnonzero(largest(values, 3)).tolist() == [21, 22, 23]
    assert largest(values, 0).sum() == 0
    assert largest(values, 24).all()
    assert largest(np.zeros((4, 6)), 5).sum() == 5
    assert iou(largest(BOX * 1.0, BOX.sum()), BOX) == 1.0


def test_prompts_name_one_circle_and_come_again():
    prompts = circle_prompts(5)
    assert prompts == circle_prompts(5)
    assert len(set(prompts)) == 5
    assert all(prompt.split().count("circle") == 1 for prompt in prompts)
