"""Where text and image lie in an attention call."""

import pytest
import torch

from workbench.attention.geometry import Scope, grid


@pytest.mark.parametrize(
    ("queries", "width", "height", "shape"),
    [
        (64, 512, 512, (8, 8)),
        (96, 768, 512, (8, 12)),
        (96, 512, 768, (12, 8)),
        (15, 40, 24, (3, 5)),
        (77, 1024, 656, (7, 11)),
        (1, 512, 512, (1, 1)),
        (32, 2048, 64, (1, 32)),
        (32, 64, 2048, (32, 1)),
        (97, 512, 512, None),
    ],
)
def test_queries_lie_as_the_picture_does(queries, width, height, shape):
    assert grid(queries, width, height) == shape


def test_in_cross_attention_every_key_is_text_and_every_query_image():
    scope = Scope("a", text=7)
    assert (scope.columns(7), scope.queries(64)) == (slice(0, 7), slice(0, 64))


@pytest.mark.parametrize(
    ("text_first", "columns", "queries"),
    [(True, slice(0, 7), slice(7, 71)), (False, slice(64, 71), slice(0, 64))],
)
def test_in_joint_attention_each_has_its_stretch(text_first, columns, queries):
    text, image = torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 64, 4)
    scope = Scope("a", text=7, mixed=True)
    scope.see_cat([text, image] if text_first else [image, text])
    assert scope.text_first is text_first
    assert (scope.columns(71), scope.queries(71)) == (columns, queries)


def test_order_once_learnt_stays():
    scope = Scope("a", text=7, mixed=True, text_first=True)
    scope.see_cat([torch.zeros(1, 64, 4), torch.zeros(1, 7, 4)])
    assert scope.text_first is True
