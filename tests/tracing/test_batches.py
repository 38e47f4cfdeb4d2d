"""Several prompts in one run, each with its own noise and its own changes."""

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError
from workbench.interventions.attach import Attach
from workbench.interventions.control import RandomDirection
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

NAMES = ("sd1", "sdxl", "sd3", "flux", "flux-cfg", "pixart", "wan22", "dit", "animatediff", "cogvideox")
CASES = [pytest.param(tiny.FAMILIES[name], id=name) for name in NAMES]
SITE = "unet.mid_block"


def several(case, count=2):
    """The case's run with several prompts at once."""
    if "class_labels" in case.arguments:
        return {**case.arguments, "class_labels": list(range(count))}
    prompts = ["a red circle", "a blue square", "a green cross"][:count]
    negative = {"negative_prompt": ["a"] * count} if "negative_prompt" in case.arguments else {}
    return {**case.arguments, "prompt": prompts, **negative}


def doubled(case, **asked):
    return Attach(case.site, module=lambda value: 2 * value, **asked)


@pytest.mark.parametrize("case", CASES)
def test_a_change_of_one_sample_leaves_the_others_to_the_bit(case):
    model = DiffusionModel(case.build())
    arguments = several(case)
    plain = model.record(**arguments, seed=0)
    for sample in (0, 1):
        edited = model.record(**arguments, seed=0, interventions=[doubled(case, samples=sample)])
        same = [as_bytes(edited.latents[:, each]) == as_bytes(plain.latents[:, each]) for each in (0, 1)]
        assert same == [each != sample for each in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_each_prompt_can_have_its_own_change(case):
    model = DiffusionModel(case.build())
    arguments = several(case)
    each = [doubled(case, samples=0), Attach(case.site, module=lambda value: 0 * value, samples=[-1])]
    both = model.record(**arguments, seed=0, interventions=each)
    alone = [model.record(**arguments, seed=0, interventions=[one]) for one in each]
    for sample in (0, 1):
        assert as_bytes(both.latents[:, sample]) == as_bytes(alone[sample].latents[:, sample])
    assert as_bytes(both.latents[:, 0]) != as_bytes(alone[1].latents[:, 0])


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_paired_by_their_noise_and_can_have_their_own(case):
    model = DiffusionModel(case.build())
    first = several(case) | {"num_inference_steps": 1}
    paired = model.record(**first, seed=5).initial
    assert torch.equal(paired[0], paired[1])
    own = model.record(**first, seed=[5, 6]).initial
    assert torch.equal(own[0], paired[0])
    assert not torch.equal(own[1], paired[1])


def run(model, prompt, **asked):
    return model.record(prompt, seed=0, num_inference_steps=4, capture=[SITE], **asked)


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def test_images_of_a_prompt_are_samples_of_their_own(model):
    arguments = {"prompt": ["a red circle", "a blue square"], "num_images_per_prompt": 2}
    plain = run(model, **arguments)
    edited = run(
        model, **arguments, interventions=[doubled(tiny.CASES["sd1"], samples=[1, 2], branch="cond")]
    )
    for branch, touched in (("cond", {1, 2}), ("uncond", set())):
        for sample in range(4):
            values = [record.at(SITE, step=0, branch=branch)[sample] for record in (plain, edited)]
            factor = 2 if sample in touched else 1
            assert torch.equal(factor * values[0], values[1])


def test_a_source_of_one_goes_into_the_chosen_sample_and_one_of_as_many_gives_each_its_own(model):
    alone = run(model, "a green cross")
    batch = ["a red circle", "a blue square"]
    patched = run(model, batch, interventions=[Patch(SITE, source=alone, steps=0, samples=1)])
    plain = run(model, batch)
    at = {"step": 0, "branch": "cond"}
    assert torch.equal(patched.at(SITE, **at)[1], alone.at(SITE, **at)[0])
    assert torch.equal(patched.at(SITE, **at)[0], plain.at(SITE, **at)[0])
    other = run(model, ["a green cross", "a blue circle"])
    given = run(model, batch, interventions=[Patch(SITE, source=other, steps=0, samples=[1])])
    assert torch.equal(given.at(SITE, **at)[1], other.at(SITE, **at)[1])


def test_a_film_goes_into_the_chosen_sample_where_frames_are_folded_into_the_batch():
    case = tiny.FAMILIES["animatediff"]
    model = DiffusionModel(case.build())
    frames = case.arguments["num_frames"]
    alone = model.record(**{**case.arguments, "prompt": "a green cross"}, seed=0, capture=[case.site])
    patch = Patch(case.site, source=alone, steps=1, samples=1)
    plain = model.record(**several(case), seed=0, capture=[case.site])
    patched = model.record(**several(case), seed=0, capture=[case.site], interventions=[patch])
    before, after = (record.at(case.site, step=1, branch="cond") for record in (plain, patched))
    assert len(after) == 2 * frames
    assert torch.equal(after[:frames], before[:frames])
    assert torch.equal(after[frames:], alone.at(case.site, step=1, branch="cond"))
    assert not torch.equal(after[frames:], before[frames:])


def test_the_control_of_a_patch_moves_the_same_samples(model):
    alone = run(model, "a green cross")
    batch = ["a red circle", "a blue square"]
    control = RandomDirection.of(Patch(SITE, source=alone, steps=0, samples=1))
    plain, moved = run(model, batch), run(model, batch, interventions=[control])
    same = [torch.equal(*(each.at(SITE, step=0)[row] for each in (plain, moved))) for row in range(4)]
    assert same == [True, False, True, False]


def test_the_identity_patch_of_one_sample_changes_nothing(model):
    batch = ["a red circle", "a blue square"]
    plain = run(model, batch)
    again = run(model, batch, interventions=[Patch(SITE, source=plain, samples=1)])
    assert as_bytes(again.latents) == as_bytes(plain.latents)


@pytest.mark.parametrize("samples", ["first", [], [0, 0], [1.5]])
def test_what_numbers_no_samples_is_refused(samples):
    with pytest.raises(InputError, match="samples="):
        doubled(tiny.CASES["sd1"], samples=samples)


def test_a_sample_that_the_run_does_not_make_is_named(model):
    with pytest.raises(InputError, match=r"makes 2 samples.*2 is none"):
        run(model, ["a red circle", "a blue square"], interventions=[doubled(tiny.CASES["sd1"], samples=2)])
