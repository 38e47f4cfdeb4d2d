import numpy as np
import pytest
import torch

from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.errors import BusyError, InputError, TraceError, UnknownNameError
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


# What is in it


def test_its_parts_are_those_of_the_pipeline(model):
    assert model.components["unet"] is model.pipeline.unet
    assert "safety_checker" not in model.components
    assert list(model.denoisers) == ["unet"]
    assert list(DiffusionModel(tiny.wan22()).denoisers) == ["transformer", "transformer_2"]


def test_modules_are_reached_as_in_torch(model):
    block = model.unet.down_blocks[1].attentions[0]
    assert block.path == "unet.down_blocks.1.attentions.0"
    assert block.module is model.pipeline.unet.down_blocks[1].attentions[0]
    assert [child.path for child in model.unet.down_blocks] == ["unet.down_blocks.0", "unet.down_blocks.1"]
    assert len(model.unet.down_blocks) == 2
    assert model.unet.down_blocks[-1].path == "unet.down_blocks.1"
    assert model.site("unet.mid_block").module is model.unet.mid_block.module


def test_what_is_no_module_is_the_parts_own(model):
    assert model.unet.config.in_channels == 4
    assert model.scheduler is model.pipeline.scheduler
    assert model.unet.dtype is torch.float32


def test_names_can_be_completed(model):
    assert {"unet", "vae", "record", "generate"} <= set(dir(model))
    assert {"mid_block", "output", "input"} <= set(dir(model.unet))


def test_it_reads_as_what_it_is(model):
    assert repr(model).startswith("DiffusionModel(StableDiffusionPipeline: vae, text_encoder")
    assert repr(model.unet.mid_block) == "unet.mid_block: UNetMidBlock2DCrossAttn"


def test_evaluation_mode_is_set_so_that_runs_repeat():
    pipeline = tiny.sd1()
    pipeline.unet.train()
    assert not DiffusionModel(pipeline).unet.module.training


# Running it


def test_record_trace_generate_and_call_run_the_pipeline(model):
    record = model.record(PROMPT, num_inference_steps=2, seed=0)
    with model.generate(PROMPT, num_inference_steps=2, seed=0) as run:
        pass
    assert as_bytes(record.latents) == as_bytes(run.latents)
    with model.trace(PROMPT, seed=0) as one:
        pass
    assert one.ledger.steps == 1
    assert model(PROMPT, seed=0).images[0].tobytes() == one.images[0].tobytes()
    with model.trace(PROMPT, seed=0, num_inference_steps=2) as two:
        pass
    assert two.ledger.steps == 2


def test_the_prompt_may_be_given_by_name(model):
    by_name = model.record(prompt=PROMPT, num_inference_steps=1, seed=0)
    assert as_bytes(by_name.latents) == as_bytes(model.record(PROMPT, num_inference_steps=1, seed=0).latents)


def test_the_same_seed_gives_the_same_noise_to_every_prompt(model):
    pair = model.record(["a red circle", "a blue square"], num_inference_steps=1, seed=3)
    assert torch.equal(pair.initial[0], pair.initial[1])
    alone = model.record(PROMPT, num_inference_steps=1, seed=np.int64(3))
    assert torch.equal(alone.initial[0], pair.initial[0])
    assert alone.spec.seed == 3


def test_several_images_have_noise_of_their_own(model):
    record = model.record(PROMPT, num_inference_steps=1, seed=3, num_images_per_prompt=2)
    assert not torch.equal(record.initial[0], record.initial[1])
    listed = model.record(PROMPT, num_inference_steps=1, seed=[3, 4], num_images_per_prompt=2)
    assert torch.equal(record.initial, listed.initial)
    assert listed.spec.seed == (3, 4)


def test_a_generator_may_be_given_instead_of_a_seed(model):
    generator = torch.Generator().manual_seed(0)
    given = model.record(PROMPT, num_inference_steps=1, generator=generator)
    assert as_bytes(given.latents) == as_bytes(model.record(PROMPT, num_inference_steps=1, seed=0).latents)
    with pytest.raises(InputError, match="a seed or a generator, not both"):
        model.record(PROMPT, num_inference_steps=1, generator=generator, seed=0)


def test_a_listener_is_told_of_every_call_and_tick(model):
    class Listening:
        def __init__(self):
            self.heard = []

        def started(self, row):
            self.heard.append(("call", row.call))

        def ticked(self, tick, latents):
            self.heard.append(("tick", tick.index, tuple(latents.shape)))

    listening = Listening()
    model.record(PROMPT, num_inference_steps=2, listener=listening)
    shape = (1, 4, 8, 8)
    assert listening.heard == [("call", 0), ("tick", 0, shape), ("call", 1), ("tick", 1, shape)]


# Refusing


@pytest.mark.parametrize(
    ("name", "near"),
    [("unett", "'unet'"), ("text_encoders", "'text_encoder'"), ("mid_block", "'unet'|There are")],
)
def test_an_unknown_component_names_the_nearest(model, name, near):
    with pytest.raises(UnknownNameError, match=f"no component or method '{name}'.*({near})"):
        getattr(model, name)


def test_an_unknown_child_names_the_nearest(model):
    with pytest.raises(UnknownNameError, match=r"unet has no module or port 'up_block'.*'up_blocks'"):
        model.unet.up_block.clone()
    with pytest.raises(UnknownNameError, match=r"unet\.down_blocks has no child 7.*'0', '1'"):
        model.unet.down_blocks[7].clone()
    with pytest.raises(UnknownNameError, match=r"no module or method 'unet\.midblock'.*'unet\.mid_block'"):
        model.site("unet.midblock")


def test_an_unknown_site_stops_before_the_run(model):
    before = footprint(model.pipeline)
    with pytest.raises(UnknownNameError, match=r"no module or method 'unet\.mid_blok'.*'unet\.mid_block'"):
        model.record(PROMPT, num_inference_steps=1, capture=["unet.mid_blok"])
    with pytest.raises(UnknownNameError, match="No port 'ouput'"):
        model.record(PROMPT, num_inference_steps=1, capture=["unet.mid_block:ouput"])
    with pytest.raises(InputError, match="is not a site"):
        model.record(PROMPT, num_inference_steps=1, capture=["unet mid_block"])
    assert footprint(model.pipeline) == before


def test_a_single_site_or_intervention_is_asked_for_as_a_list(model):
    with pytest.raises(InputError, match=r"capture=\['unet\.mid_block'\]"):
        model.record(PROMPT, capture="unet.mid_block")
    source = model.record(PROMPT, num_inference_steps=1, capture=["unet.mid_block"])
    with pytest.raises(InputError, match=r"interventions=\[wb\.Patch"):
        model.record(PROMPT, interventions=Patch("unet.mid_block", source=source))
    with pytest.raises(InputError, match="is not an intervention"):
        model.record(PROMPT, interventions=["unet.mid_block"])


def test_only_ports_can_be_replaced(model):
    with pytest.raises(UnknownNameError, match="Only the ports input, inputs, output"):
        model.unet.weight = 0
    with pytest.raises(TraceError, match="only while the model runs"):
        model.unet.output = 0


def test_a_model_is_no_sequence(model):
    with pytest.raises(TypeError, match=r"model\.components"):
        list(model)


def test_a_second_run_is_refused_from_a_callback_and_the_first_goes_on(model):
    bare = model.record(PROMPT, num_inference_steps=2, seed=0)
    refused = []

    def callback(pipeline, step, timestep, tensors):
        with pytest.raises(BusyError):
            model.record(PROMPT)
        refused.append(step)
        return tensors

    record = model.record(PROMPT, num_inference_steps=2, seed=0, callback_on_step_end=callback)
    assert refused == [0, 1]
    assert as_bytes(record.latents) == as_bytes(bare.latents)


def test_after_a_refusal_the_model_runs(model):
    for bad in ({"capture": ["nowhere"]}, {"seed": "x"}, {"num_inference_steps": 0}, {"nothing": 1}):
        with pytest.raises((UnknownNameError, InputError)):
            model.record(PROMPT, **bad)
    assert model.record(PROMPT, num_inference_steps=1).ledger.steps == 1
