from collections import namedtuple

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from tests.watching import as_bytes
from workbench.errors import ShapeError, UnknownNameError
from workbench.tracing.structure import check_fit, describe, keep, leaves, map_tensors, pick, put, spell

Pair = namedtuple("Pair", "first second")
A, B, C = torch.zeros(2, 3), torch.ones(2), torch.full((1,), 2.0)
NESTED = (A, {"hidden": [B, None], "name": "x"}, C)


def test_leaves_come_depth_first_with_their_places():
    assert [(leaf, tensor.shape) for leaf, tensor in leaves(NESTED)] == [
        ((0,), A.shape),
        ((1, "hidden", 0), B.shape),
        ((2,), C.shape),
    ]
    assert list(leaves("no tensor")) == []


@pytest.mark.parametrize("value", [NESTED, Pair(A, B), [A, (B,)], UNet2DConditionOutput(sample=A), {"a": A}])
def test_mapping_keeps_the_structure(value):
    doubled = map_tensors(value, lambda tensor: tensor + 1)
    assert type(doubled) is type(value)
    assert [(leaf, as_bytes(tensor)) for leaf, tensor in leaves(doubled)] == [
        (leaf, as_bytes(tensor + 1)) for leaf, tensor in leaves(value)
    ]


def test_a_kept_value_is_out_of_reach_of_later_edits_and_keeps_its_strides():
    value = {"a": torch.arange(6.0).reshape(2, 3).t().requires_grad_()}
    kept = keep(value)
    with torch.no_grad():
        value["a"].zero_()
    assert kept["a"][2, 1] == 5
    assert kept["a"].stride() == value["a"].stride()
    assert not kept["a"].requires_grad


def test_picking_follows_the_selector():
    assert pick(NESTED, (1, "hidden", 0), site="x") is B
    assert pick(A, (), site="x") is A
    assert pick((A, None), (), site="x") is A
    output = UNet2DConditionOutput(sample=A)
    assert pick(output, ("sample",), site="x") is A
    assert pick(output, (0,), site="x") is A


def test_picking_one_of_several_lists_the_choices():
    with pytest.raises(
        ShapeError, match=r"holds 3 tensors.*unet\[0\] \(2, 3\) float32.*unet\[1\].hidden\[0\]"
    ):
        pick(NESTED, (), site="unet")
    with pytest.raises(ShapeError, match=r"holds 0 tensors.*none"):
        pick("text", (), site="unet")


@pytest.mark.parametrize("leaf", [(7,), (1, "hiden"), (1, "hidden", 5), (0, "x")])
def test_picking_nothing_names_the_nearest_part(leaf):
    with pytest.raises(UnknownNameError, match="has no part"):
        pick(NESTED, leaf, site="unet")


def test_putting_replaces_one_part_and_leaves_the_rest():
    changed = put(NESTED, (1, "hidden", 0), C, site="x")
    assert changed[1]["hidden"][0] is C
    assert changed[0] is A
    assert NESTED[1]["hidden"][0] is B


def test_putting_without_a_selector_replaces_the_only_tensor():
    assert put((A, None), (), B, site="x") == (B, None)
    output = put(UNet2DConditionOutput(sample=A), (), B, site="x")
    assert isinstance(output, UNet2DConditionOutput)
    assert output.sample is B
    assert put(A, (), B, site="x") is B
    with pytest.raises(ShapeError, match="holds 2 tensors"):
        put((A, B), (), C, site="x")


def test_a_named_tuple_stays_one():
    assert put(Pair(A, B), (1,), C, site="x") == Pair(A, C)


def test_a_replacement_must_fit_and_both_are_printed():
    check_fit(A, torch.ones(2, 3), site="x")
    with pytest.raises(ShapeError, match=r"x is \(2, 3\) float32; the replacement is \(3, 2\) float32"):
        check_fit(A, torch.ones(3, 2), site="x")
    with pytest.raises(ShapeError, match=r"float32; the replacement is \(2, 3\) float16"):
        check_fit(A, torch.ones(2, 3, dtype=torch.float16), site="x")
    with pytest.raises(ShapeError, match=r"x is \(2, 3\) float32; the replacement is float\."):
        check_fit(A, 0.0, site="x")


def test_a_structure_is_replaced_by_one_alike():
    check_fit((A, None), (A + 1, None), site="x")
    check_fit((A, None), A, site="x")
    with pytest.raises(ShapeError, match=r"x is tuple of \[0\] \(2, 3\).*is tuple of \[0\] \(3, 2\)"):
        check_fit((A, B), (A.T, B), site="x")
    with pytest.raises(ShapeError, match=r"the replacement is tuple of \[0\] \(2, 3\) float32\. They"):
        check_fit((A, B), (A,), site="x")
    with pytest.raises(ShapeError, match="holds 2 tensors"):
        check_fit((A, B), A, site="x")


def test_values_are_described_by_shape_and_dtype():
    assert describe(A) == "(2, 3) float32"
    assert describe((A, B)) == "tuple of [0] (2, 3) float32, [1] (2,) float32"
    assert describe("text") == "str"
    assert spell((1, "hidden", 0)) == "[1].hidden[0]"
