"""The tree as data, and the sites a patch map begins with."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.watching import footprint
from workbench.models.model import DiffusionModel
from workbench.models.outline import Shapes, outline, patch_sites


def watched(name):
    case = tiny.CASES[name]
    model = DiffusionModel(case.build())
    seen = Shapes()
    record = model.record(**{**case.arguments, "num_inference_steps": 2}, seed=0, capture=[seen])
    return model, seen, record


def test_tree_has_every_component_and_module_in_preorder():
    model = DiffusionModel(tiny.sd1())
    nodes = {node.path: node for node in outline(model)}
    assert next(iter(nodes)) == next(iter(model.components))
    assert set(model.components) == {node.path for node in nodes.values() if node.depth == 0}
    paths = list(nodes)
    for path in paths:
        parent = path.rpartition(".")[0]
        assert not parent or paths.index(parent) < paths.index(path)
    unet = nodes["unet"]
    assert unet.parameters == sum(each.numel() for each in model.pipeline.unet.parameters())
    assert (unet.cls, unet.kind, unet.dtype, unet.device) == (
        "UNet2DConditionModel",
        "component",
        "float32",
        "cpu",
    )
    assert nodes["unet.mid_block"].kind == "module"
    attention = nodes["unet.mid_block.attentions.0.transformer_blocks.0.attn2"]
    assert (attention.kind, attention.name, attention.depth) == ("attention", "attn2", 6)
    assert (nodes["tokenizer"].kind, nodes["tokenizer"].parameters) == ("other", 0)
    assert {node.shape for node in nodes.values()} == {""}


def test_shapes_are_those_of_the_run_and_nothing_stays():
    case = tiny.CASES["sd1"]
    pipeline = case.build()
    model = DiffusionModel(pipeline)
    model.record(**case.arguments, seed=0)
    before = footprint(pipeline)
    seen = Shapes()
    record = model.record(**case.arguments, seed=0, capture=[seen, "unet.mid_block"])
    assert footprint(pipeline) == before
    assert seen.text()["unet.mid_block"] == "2×16×4×4"
    assert tuple(record["unet.mid_block"].shape[1:]) == (2, 16, 4, 4)
    assert seen.bytes["unet.mid_block"] == record["unet.mid_block"][0].numel() * 4
    model.shapes = seen.text()
    assert {node.path: node.shape for node in outline(model)}["unet.mid_block"] == "2×16×4×4"


SITES = {
    "sd1": {
        "unet.down_blocks.0:output[0]",
        "unet.down_blocks.1:output[0]",
        "unet.down_blocks.1.attentions.0",
        "unet.mid_block",
        "unet.mid_block.attentions.0",
        "unet.up_blocks.0",
        "unet.up_blocks.1",
    },
    "sd3": {
        "transformer.transformer_blocks.0:output[0]",
        "transformer.transformer_blocks.0:output[1]",
        "transformer.transformer_blocks.1",
    },
    "flux": {
        "transformer.transformer_blocks.0:output[0]",
        "transformer.transformer_blocks.0:output[1]",
        "transformer.single_transformer_blocks.0:output[0]",
        "transformer.single_transformer_blocks.0:output[1]",
    },
    "ddpm": {"unet.mid_block", "unet.down_blocks.0:output[0]", "unet.up_blocks.1"},
}


@pytest.mark.parametrize("name", list(SITES))
def test_patch_map_begins_with_each_blocks_output(name):
    model, seen, _ = watched(name)
    found = [str(site) for site in patch_sites(model.denoisers, seen)]
    assert SITES[name] <= set(found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_sites_of_the_map_can_be_captured(name):
    model, seen, _ = watched(name)
    sites = [str(site) for site in patch_sites(model.denoisers, seen)]
    case = tiny.CASES[name]
    record = model.record(**{**case.arguments, "num_inference_steps": 2}, seed=0, capture=sites)
    assert all(record[site].ndim >= 4 for site in sites)
    assert len(sites) == len({site for site in sites if record.at(site, step=1, branch="cond").numel()})
