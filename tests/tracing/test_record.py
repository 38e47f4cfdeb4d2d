import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, OutOfOrderError, ShapeError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record, RunSpec

SITES = [
    "unet.mid_block",
    "unet.conv_in:input",
    "unet:output[0]",
    "unet.down_blocks.0",
    "text_encoder",
    "vae.encoder",
]


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def record(model):
    return model.record("a red circle", num_inference_steps=3, seed=0, capture=SITES)


def test_a_site_gives_its_values_call_by_call(record):
    assert record["unet.mid_block"].shape == (3, 2, 16, 4, 4)
    assert record["unet.conv_in:input"].shape == (3, 2, 4, 8, 8)
    assert record["unet:output[0]"].shape == (3, 2, 4, 8, 8)


def test_a_value_is_found_by_step_and_branch(record):
    values = record["unet.mid_block"]
    assert torch.equal(record.at("unet.mid_block", step=1), values[1])
    assert torch.equal(record.at("unet.mid_block", step=-1), values[2])
    assert torch.equal(record.at("unet.mid_block", step=1, branch="uncond"), values[1, :1])
    assert torch.equal(record.at("unet.mid_block", step=1, branch="cond"), values[1, 1:])


def test_a_part_is_picked_from_what_was_captured_whole(record):
    whole = record.passages("unet.down_blocks.0")[1].value
    assert torch.equal(record.at("unet.down_blocks.0:output[0]", step=1), whole[0])
    assert torch.equal(record["unet.down_blocks.0:output[1][0]"][1], whole[1][0])
    with pytest.raises(ShapeError, match=r"tensors, so say which one: unet\.down_blocks\.0\[0\]"):
        record["unet.down_blocks.0"].clone()


def test_what_passes_outside_the_calls_is_kept_in_order(record):
    passages = record.passages("text_encoder")
    assert [passage.call for passage in passages] == [None, None]
    with pytest.raises(OutOfOrderError, match="text_encoder did not pass in step 0"):
        record.at("text_encoder", step=0)


def test_the_latents_lead_from_the_noise_to_the_image(record, model):
    assert record.latents.shape == record.noise_pred.shape == record.pred_x0.shape == (3, 1, 4, 8, 8)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert as_bytes(record.initial) == as_bytes(noise * model.pipeline.scheduler.init_noise_sigma)
    assert torch.equal(record.step_latents(-1), record.latents[2])
    end = model.pipeline(
        "a red circle",
        num_inference_steps=3,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
    assert as_bytes(record.latents[-1]) == as_bytes(end.images)


def test_the_guided_prediction_is_that_of_the_branches(record):
    uncond, cond = record["unet:output[0]"][0]
    guided = uncond + 7.5 * (cond - uncond)
    torch.testing.assert_close(record.noise_pred[0, 0], guided)


def test_a_second_order_step_keeps_every_tick():
    from diffusers import HeunDiscreteScheduler

    model = DiffusionModel(tiny.sd1(HeunDiscreteScheduler))
    record = model.record("a red circle", num_inference_steps=3, seed=0, capture=["unet.mid_block"])
    assert len(record.latents) == record.ledger.ticks == 5
    assert torch.equal(record.step_latents(0), record.latents[1])
    assert torch.equal(record.at("unet.mid_block", step=0, nth=1), record["unet.mid_block"][1])
    with pytest.raises(OutOfOrderError, match="has 2 calls of branch 'all'; there is no 2"):
        record.at("unet.mid_block", step=0, nth=2)


def test_guidance_in_two_calls_is_found_by_branch():
    case = tiny.CASES["flux-cfg"]
    record = DiffusionModel(case.build()).record(**case.arguments, seed=0, capture=[case.site])
    values = record[case.site]
    assert torch.equal(record.at(case.site, step=1, branch="cond"), values[2])
    assert torch.equal(record.at(case.site, step=1, branch="uncond"), values[3])


def test_kept_values_are_out_of_reach(model):
    record = model.record("a red circle", num_inference_steps=1, seed=0, capture=["unet.mid_block"])
    again = model.record("a blue square", num_inference_steps=1, seed=1, capture=["unet.mid_block"])
    before = as_bytes(record["unet.mid_block"])
    again.passages("unet.mid_block")[0].value.zero_()
    assert as_bytes(record["unet.mid_block"]) == before


# What was asked


def test_the_spec_says_what_was_asked(record):
    assert record.spec.arguments == {"prompt": "a red circle", "num_inference_steps": 3}
    assert record.spec.seed == 0
    assert record.spec.capture == tuple(SITES)
    assert record.fork(1).spec.forked_at == 1


def test_the_spec_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="extra"):
        RunSpec(promt="a red circle")


# Bad requests


def test_a_site_that_was_not_captured_names_the_nearest_and_what_to_do(record):
    with pytest.raises(
        UnknownNameError, match=r"unet\.midblock was not captured.*'unet\.mid_block'.*capture="
    ):
        record["unet.midblock"].clone()


def test_a_site_that_never_passed_is_not_taken_for_one_that_was_not_asked_for(record):
    with pytest.raises(OutOfOrderError, match=r"vae\.encoder never passed in this run"):
        record["vae.encoder"].clone()


def test_unknown_ports_steps_and_branches_are_refused(record):
    with pytest.raises(UnknownNameError, match="No port 'outputs'"):
        record["unet.mid_block:outputs"].clone()
    with pytest.raises(InputError, match=r"has 3 steps \(0 to 2\); 3 is none"):
        record.at("unet.mid_block", step=3)
    with pytest.raises(UnknownNameError, match=r"no branch 'conditional'.*'cond'"):
        record.at("unet.mid_block", step=0, branch="conditional")


def test_outputs_the_pipeline_did_not_return_are_named(record):
    assert len(record.images) == 1
    with pytest.raises(UnknownNameError, match=r"returned no frames.*images"):
        record.frames.copy()
    with pytest.raises(UnknownNameError, match="returned no audios"):
        record.audios.copy()


def test_frames_and_plain_tuples_are_found():
    case = tiny.CASES["wan"]
    record = DiffusionModel(case.build()).record(**case.arguments, seed=0)
    assert record.frames.shape[:2] == (1, 5)
    plain = DiffusionModel(tiny.sd1()).record("a red circle", num_inference_steps=1, return_dict=False)
    assert plain.images[0].size == (16, 16)


def test_images_are_found_in_the_state_of_blocks_and_in_a_list():
    case = tiny.FAMILIES["modular-sdxl"]
    model = DiffusionModel(case.build())
    asked = {**case.arguments, "num_inference_steps": 1, "seed": 0}
    state, alone = model.record(**{**asked, "output": None}), model.record(**{**asked, "output": "images"})
    assert state.images[0].tobytes() == alone.images[0].tobytes() == model.record(**asked).images[0].tobytes()
    with pytest.raises(UnknownNameError, match="no frames"):
        state.frames.clone()


def test_a_record_without_its_model_cannot_be_forked():
    with pytest.raises(InputError, match="Record it anew"):
        Record(RunSpec()).fork(0)
