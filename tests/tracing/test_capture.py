"""`Capture`: fewer steps, rows and bytes of a site, and what can still be done with them."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, OutOfOrderError, UnknownNameError
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.tracing.capture import Capture
from workbench.tracing.storage.saved import load_record

SITE = "unet.mid_block"
PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def run(model, *capture, **arguments):
    return model.record(PROMPT, **{"num_inference_steps": 4, "seed": 0, "capture": capture, **arguments})


@pytest.fixture(scope="module")
def whole(model):
    return run(model, SITE, "unet.down_blocks.0", "text_encoder")


def test_by_default_it_is_a_plain_site(model, whole):
    chosen = run(model, Capture(SITE), Capture("text_encoder"))
    assert as_bytes(chosen[SITE]) == as_bytes(whole[SITE])
    assert as_bytes(chosen.at(SITE, step=1, branch="cond")) == as_bytes(whole.at(SITE, step=1, branch="cond"))
    assert len(chosen.passages("text_encoder")) == 2
    assert as_bytes(chosen.latents) == as_bytes(whole.latents)


def test_it_keeps_the_steps_the_branch_and_the_dtype_asked_for(model, whole):
    chosen = run(
        model, Capture(SITE, dtype="float16", device="cpu", steps=range(1, 3), branch="cond"), "unet.conv_in"
    )
    assert chosen[SITE].dtype == torch.float16
    assert torch.equal(chosen[SITE], whole[SITE][1:3, 1:].half())
    assert [each.call for each in chosen.passages(SITE)] == [1, 2]
    for branch in ("all", "cond"):
        assert torch.equal(chosen.at(SITE, step=2, branch=branch), whole[SITE][2, 1:].half())
    assert chosen["unet.conv_in"].shape[:2] == (4, 2)


def test_what_was_not_kept_is_named(model):
    chosen = run(model, Capture(SITE, steps=[1, -1], branch="cond"))
    with pytest.raises(OutOfOrderError, match=r"not kept there\. Steps with a value: 1, 3"):
        chosen.at(SITE, step=0)
    with pytest.raises(OutOfOrderError, match="only the branch 'cond' was kept, not 'uncond'"):
        chosen.at(SITE, step=1, branch="uncond")
    nothing = run(model, Capture(SITE, branch="conditional"))
    with pytest.raises(OutOfOrderError, match=r"none of the run's calls.*branches uncond, cond"):
        nothing[SITE].clone()


def test_parts_of_a_structure_are_kept_alike(model, whole):
    site = "unet.down_blocks.0"
    chosen = run(
        model, Capture(site, dtype=torch.float16, branch="uncond"), Capture("unet:output[0]", steps=0)
    )
    kept, before = chosen.passages(site)[2].value, whole.passages(site)[2].value
    assert type(kept) is type(before)
    assert torch.equal(kept[1][0], before[1][0][:1].half())
    assert chosen["unet:output[0]"].shape == (1, 2, 4, 8, 8)


def test_whole_numbers_keep_their_dtype(model):
    chosen = run(model, Capture("text_encoder:inputs", dtype="float16"))
    ids = chosen.passages("text_encoder:inputs")[0].value[0][0]
    assert not ids.is_floating_point()


def test_guidance_in_two_calls_keeps_the_calls_of_the_branch():
    case = tiny.CASES["flux-cfg"]
    model = DiffusionModel(case.build())
    whole = model.record(**case.arguments, seed=0, capture=[case.site])
    chosen = model.record(**case.arguments, seed=0, capture=[Capture(case.site, branch="uncond")])
    assert as_bytes(chosen[case.site]) == as_bytes(whole[case.site][1::2])


def test_it_is_a_source_of_a_patch_where_it_kept_something(model, whole):
    chosen = run(model, Capture(SITE, steps=range(2), branch="cond"))
    patched, exact = (
        model.record(
            "a blue square",
            num_inference_steps=4,
            seed=0,
            interventions=[Patch(SITE, source=source, steps=range(2), branch="cond")],
        )
        for source in (chosen, whole)
    )
    assert as_bytes(patched.latents) == as_bytes(exact.latents)
    with pytest.raises(OutOfOrderError, match="'cond' was kept, not 'uncond'"):
        model.record("a blue square", num_inference_steps=4, interventions=[Patch(SITE, source=chosen)])


def test_a_fork_keeps_on_capturing_so(model, whole):
    capture = Capture(SITE, dtype="float16", steps=range(1, 4), branch="cond")
    chosen = run(model, capture)
    assert as_bytes(chosen.fork(2)[SITE]) == as_bytes(chosen[SITE])
    assert as_bytes(whole.fork(2, capture=[capture])[SITE]) == as_bytes(chosen[SITE])
    # What was kept in part is no part of a whole.
    assert len(chosen.fork(2, capture=[SITE])[SITE]) == 2
    assert len(chosen.fork(2, capture=[Capture(SITE)])[SITE]) == 2


def test_it_is_saved_with_the_record(model, tmp_path):
    capture = Capture(SITE, dtype="bfloat16", steps=slice(1, None), branch="cond")
    chosen = run(model, capture)
    loaded = load_record(chosen.save(tmp_path / "run"), model=model)
    assert loaded.spec.capture == (capture,)
    assert as_bytes(loaded[SITE]) == as_bytes(chosen[SITE])
    assert as_bytes(loaded.at(SITE, step=1, branch="cond")) == as_bytes(
        chosen.at(SITE, step=1, branch="cond")
    )
    assert as_bytes(loaded.fork(2)[SITE]) == as_bytes(chosen[SITE])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "flaot16"}, "no dtype"),
        ({"device": "gpu-ish"}, "no device"),
        ({"device": "meta"}, "keeps no values"),
        ({"steps": []}, "is empty"),
        ({"branch": ""}, "not a branch"),
        ({"site": "unet mid"}, "is not a site"),
    ],
)
def test_a_bad_choice_is_refused_at_once(arguments, message):
    with pytest.raises(InputError, match=message):
        Capture(**{"site": SITE, **arguments})


def test_bad_captures_are_refused_before_the_run(model):
    for capture, message in [
        ([SITE, Capture(SITE)], "two ways"),
        ([Capture(SITE), Capture(SITE, branch="cond")], "two ways"),
        ([3], "captures nothing"),
        (Capture(SITE), "takes a list"),
    ]:
        with pytest.raises(InputError, match=message):
            model.record(PROMPT, num_inference_steps=1, capture=capture)
    with pytest.raises(UnknownNameError, match=r"'unet\.mid_block'"):
        run(model, Capture("unet.mid_blok"))


def test_a_step_the_run_does_not_have_is_refused(model):
    with pytest.raises(InputError, match="9 is none of them"):
        run(model, Capture(SITE, steps=[9]))


@pytest.mark.gpu
def test_on_a_gpu_values_stay_there_if_asked(tmp_path):
    model = DiffusionModel(tiny.sd1().to("cuda"))
    chosen = run(model, Capture(SITE, device=None), "unet.conv_in")
    assert chosen[SITE].device.type == "cuda"
    assert chosen["unet.conv_in"].device.type == "cpu"
    loaded = load_record(chosen.save(tmp_path / "run"), model=model)
    assert as_bytes(loaded[SITE]) == as_bytes(chosen[SITE])
    assert as_bytes(loaded.fork(2).latents) == as_bytes(chosen.latents)
