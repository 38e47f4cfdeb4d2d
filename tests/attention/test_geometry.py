"""Where text and image lie in an attention call."""

import pytest
import torch

from workbench.attention.geometry import BLOCKS, Scope, aspect_of, grid


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
    assert (scope.span("text", 7), scope.span("image", 64)) == (slice(0, 7), slice(0, 64))
    assert [block for block in BLOCKS if scope.has(block)] == ["image->text"]
    assert [block for block in BLOCKS if Scope("a").has(block)] == ["image->image"]


@pytest.mark.parametrize(
    ("text_first", "columns", "queries"),
    [(True, slice(0, 7), slice(7, 71)), (False, slice(64, 71), slice(0, 64))],
)
def test_in_joint_attention_each_has_its_stretch(text_first, columns, queries):
    text, image = torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 64, 4)
    scope = Scope("a", text=7, mixed=True)
    scope.see_cat([text, image] if text_first else [image, text])
    assert scope.text_first is text_first
    assert (scope.span("text", 71), scope.span("image", 71)) == (columns, queries)
    assert all(scope.has(block) for block in BLOCKS)


def test_order_once_learnt_stays():
    scope = Scope("a", text=7, mixed=True, text_first=True)
    scope.see_cat([torch.zeros(1, 64, 4), torch.zeros(1, 7, 4)])
    assert scope.text_first is True


def test_the_shape_of_pictures_is_that_of_the_sample_or_of_what_was_asked():
    assert aspect_of(torch.zeros(2, 4, 8, 12), {}) == (12, 8)
    assert aspect_of(torch.zeros(1, 4, 5, 8, 12), {"width": 3, "height": 3}) == (12, 8)
    assert aspect_of(torch.zeros(1, 96, 64), {"width": 24, "height": 16}) == (24, 16)
    assert aspect_of(torch.zeros(1, 96, 64), {}) == (1, 1)
