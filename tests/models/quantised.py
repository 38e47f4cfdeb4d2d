"""Weights in eight bits: run by `test_options` in a process that has torchao."""

import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig
from torchao.quantization import Int8WeightOnlyConfig

from tests import tiny
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel


def test_quantised_weights_are_traced_and_captured(tmp_path):
    tiny.sd1().save_pretrained(tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = DiffusionModel(
        tmp_path,
        dispatch=True,
        dtype=torch.float32,
        quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config}),
    )
    layer = model.components["unet"].mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert type(layer.weight).__name__ == "Int8Tensor"
    settings = {"prompt": "a red circle", "seed": 0, "num_inference_steps": 2}
    run = model.record(**settings, capture=["unet.mid_block"])
    plain = DiffusionModel(tmp_path, dispatch=True).record(**settings, capture=["unet.mid_block"])
    difference = (run["unet.mid_block"] - plain["unet.mid_block"]).abs().max()
    assert 0 < difference < 0.05 * plain["unet.mid_block"].abs().max()
    assert torch.equal(run.fork(1).latents, run.latents)
    patch = Patch("unet.mid_block", source=run)
    assert torch.equal(model.record(**settings, interventions=[patch]).latents, run.latents)
