"""Patches put the source's value where they say, and nowhere else."""

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, OutOfOrderError, ShapeError, UnknownNameError
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

SITE = "unet.mid_block"
STEPS = 4


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def run(model, prompt, seed=0, **arguments):
    return model.record(
        prompt,
        seed=seed,
        **{"num_inference_steps": STEPS, "capture": [SITE, "unet.conv_out", "text_encoder"], **arguments},
    )


@pytest.fixture(scope="module")
def source(model):
    return run(model, "a red circle", seed=1)


@pytest.fixture(scope="module")
def target(model):
    return run(model, "a blue square")


def patched(model, *patches):
    return run(model, "a blue square", interventions=list(patches))


# The value arrives


@pytest.mark.parametrize("branch", ["all", "both", "cond", "uncond"])
def test_the_sources_rows_arrive_and_the_others_stay(model, source, target, branch):
    record = patched(model, Patch(SITE, source=source, steps=[0], branch=branch))
    for each in ("uncond", "cond"):
        origin = source if branch in (each, "all", "both") else target
        assert as_bytes(record.at(SITE, step=0, branch=each)) == as_bytes(
            origin.at(SITE, step=0, branch=each)
        )


@pytest.mark.parametrize(
    ("steps", "hit"),
    [
        (None, [0, 1, 2, 3]),
        (range(1, 3), [1, 2]),
        (-1, [3]),
        ([0, -2], [0, 2]),
        (slice(None, None, 2), [0, 2]),
    ],
)
def test_only_the_chosen_steps_are_patched(model, source, steps, hit):
    record = patched(model, Patch(SITE, source=source, steps=steps))
    same = [torch.equal(record.at(SITE, step=step), source.at(SITE, step=step)) for step in range(STEPS)]
    assert [step for step in range(STEPS) if same[step]] == hit


@pytest.mark.parametrize("name", tiny.CASES)
def test_with_all_the_denoisers_outputs_the_target_becomes_the_source(name):
    """Known end: with every prediction the source's, the latents follow the source's byte for byte."""
    case = tiny.CASES[name]
    model = DiffusionModel(case.build())
    sites = [f"{component}:output[0]" for component in model.denoisers]
    if name in ("ddpm",):
        sites = ["unet:output.sample"]
    if name == "dit":
        sites = ["transformer:output.sample"]
    other = {**case.arguments, **({"prompt": "a blue square"} if "prompt" in case.arguments else {})}
    if name == "dit":
        other = {**case.arguments, "class_labels": [7]}
    source = model.record(**case.arguments, seed=0, capture=sites)
    bare = model.record(**other, seed=0)
    made = model.record(**other, seed=0, interventions=[Patch(site, source=source) for site in sites])
    assert as_bytes(made.latents) == as_bytes(source.latents)
    assert as_bytes(dict(made.output)) == as_bytes(dict(source.output))
    if name != "ddpm":
        assert as_bytes(bare.latents) != as_bytes(source.latents)


def test_a_patch_of_one_branch_is_found_among_separate_calls():
    case = tiny.CASES["flux-cfg"]
    model = DiffusionModel(case.build())
    source = model.record(**{**case.arguments, "prompt": "a green cross"}, seed=0, capture=[case.site])
    target = model.record(**case.arguments, seed=0, capture=[case.site])
    patch = Patch(case.site, source=source, steps=[1], branch="cond")
    record = model.record(**case.arguments, seed=0, capture=[case.site], interventions=[patch])
    for branch, origin in (("cond", source), ("uncond", target)):
        assert as_bytes(record.at(case.site, step=1, branch=branch)) == as_bytes(
            origin.at(case.site, step=1, branch=branch)
        )
    assert as_bytes(record.latents[1]) != as_bytes(target.latents[1])


def test_both_halves_of_a_second_order_step_get_their_own_value():
    from diffusers import HeunDiscreteScheduler

    model = DiffusionModel(tiny.sd1(HeunDiscreteScheduler))
    source = run(model, "a red circle", seed=1)
    record = patched(model, Patch(SITE, source=source, steps=[1]))
    for nth in (0, 1):
        assert torch.equal(record.at(SITE, step=1, nth=nth), source.at(SITE, step=1, nth=nth))
    assert not torch.equal(source.at(SITE, step=1, nth=0), source.at(SITE, step=1, nth=1))


def test_an_input_can_be_patched(model):
    site = "unet.mid_block:input"
    source = run(model, "a red circle", seed=1, capture=[site])
    record = run(model, "a blue square", capture=[site], interventions=[Patch(site, source=source)])
    assert as_bytes(record[site]) == as_bytes(source[site])


def test_one_part_of_several_can_be_patched(model):
    site = "unet.down_blocks.0:output[0]"
    source = run(model, "a red circle", seed=1, capture=["unet.down_blocks.0"])
    record = run(
        model, "a blue square", capture=["unet.down_blocks.0"], interventions=[Patch(site, source=source)]
    )
    assert as_bytes(record[site]) == as_bytes(source[site])
    skip = "unet.down_blocks.0:output[1][0]"
    assert as_bytes(record[skip]) != as_bytes(source[skip])


def test_patches_apply_in_their_order(model, source, target):
    one = Patch(SITE, source=source)
    back = Patch(SITE, source=target, steps=[0])
    assert as_bytes(patched(model, one, back).at(SITE, step=0)) == as_bytes(target.at(SITE, step=0))
    assert as_bytes(patched(model, back, one).at(SITE, step=0)) == as_bytes(source.at(SITE, step=0))


def test_one_source_row_serves_every_sample(model, source):
    record = run(
        model, ["a blue square", "a green cross"], interventions=[Patch(SITE, source=source, branch="cond")]
    )
    values = record.at(SITE, step=0, branch="cond")
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[:1], source.at(SITE, step=0, branch="cond"))


def test_the_source_is_not_touched(model, source):
    before = as_bytes(source[SITE])
    patched(model, Patch(SITE, source=source))
    assert as_bytes(source[SITE]) == before


# Refusing


def test_a_source_must_have_captured_the_site(source):
    with pytest.raises(UnknownNameError, match=r"unet\.conv_in was not captured.*'unet\.conv_out'"):
        Patch("unet.conv_in", source=source)


@pytest.mark.parametrize("nothing", [None, "a red circle", {}])
def test_a_source_must_be_a_record(nothing):
    with pytest.raises(InputError, match=r"is no record. Make one: source = model\.record"):
        Patch(SITE, source=nothing)


def test_a_source_without_guidance_has_nothing_for_the_other_branch(model):
    plain = run(model, "a red circle", guidance_scale=1.0)
    said = r"step 0, the run has a branch 'uncond' and the source has cond alone.*branch='cond'"
    with pytest.raises(InputError, match=said):
        patched(model, Patch(SITE, source=plain))
    assert patched(model, Patch(SITE, source=plain, branch="cond")).images


def test_a_branch_must_be_one_of_the_sources(source):
    with pytest.raises(UnknownNameError, match=r"no branch 'con'.*'cond'"):
        Patch(SITE, source=source, branch="con")
    with pytest.raises(InputError, match="branch=None is not a branch"):
        Patch(SITE, source=source, branch=None)


@pytest.mark.parametrize("steps", [4, -5, [0, 9]])
def test_steps_must_be_those_of_the_source(source, steps):
    with pytest.raises(InputError, match=r"has 4 steps \(0 to 3\)"):
        Patch(SITE, source=source, steps=steps)


def test_steps_the_target_does_not_have_are_refused(model, source):
    with pytest.raises(InputError, match=r"has 2 steps \(0 to 1\); 3 is none"):
        run(
            model,
            "a blue square",
            num_inference_steps=2,
            interventions=[Patch(SITE, source=source, steps=[3])],
        )


def test_a_target_with_more_steps_than_the_source_is_refused(model, source):
    with pytest.raises(InputError, match="has 4 steps"):
        run(model, "a blue square", num_inference_steps=5, interventions=[Patch(SITE, source=source)])


def test_a_site_is_spelled_as_a_site(source):
    with pytest.raises(InputError, match="is not a site"):
        Patch("unet mid", source=source)
    with pytest.raises(InputError, match="is empty"):
        Patch(SITE, source=source, steps=[])


def test_what_passes_outside_the_steps_cannot_be_patched_by_step(source):
    with pytest.raises(InputError, match="text_encoder passes outside the steps"):
        Patch("text_encoder", source=source)


def test_another_shape_is_refused_with_both_printed(model, source):
    other = run(model, "a red circle", height=32, width=32)
    with pytest.raises(ShapeError, match=r"step 0, the source has \(1, 16, 8, 8\).*target \(1, 16, 4, 4\)"):
        patched(model, Patch(SITE, source=other))


def test_another_number_of_samples_is_refused(model):
    other = run(model, ["a red circle"] * 3)
    with pytest.raises(ShapeError, match="same size and number of samples"):
        run(model, ["a red circle"] * 2, interventions=[Patch(SITE, source=other)])


def test_a_step_the_source_did_not_compute_is_refused(model, source):
    late = source.fork(2, capture=["unet.conv_in"])
    with pytest.raises(OutOfOrderError, match=r"unet\.conv_in did not pass in step 0"):
        patched(model, Patch("unet.conv_in", source=late))


def test_after_a_refusal_the_model_runs(model, source, target):
    other = run(model, "a red circle", height=32, width=32)
    with pytest.raises(ShapeError):
        patched(model, Patch(SITE, source=other))
    assert as_bytes(run(model, "a blue square").latents) == as_bytes(target.latents)
