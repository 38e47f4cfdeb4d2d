"""What attention would take, before a run: bytes to the byte, and a narrower request where it is too much."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.allocations import peak
from tests.watching import footprint
from workbench.attention.request import Attention
from workbench.errors import InputError
from workbench.models.model import DiffusionModel

REQUESTS = [
    {},
    {"reduce": []},
    {"reduce": [], "heads": [1], "dtype": torch.float16},
    {"words": ["red circle"], "steps": [1, 2]},
    {"reduce": ["heads", "steps"]},
    {"reduce": ["heads", "layers"]},
    {"reduce": ["heads", "layers", "steps"]},
    {"top": 2},
    {"block": "image->image"},
    {"block": "image->image", "pixels": [(0.5, 0.5)], "reduce": []},
]


def opened(name="sd1"):
    case = tiny.CASES[name]
    return DiffusionModel(case.build()), case.arguments


def size(maps):
    tensors = [*maps.layers.values(), *maps.indices.values()]
    return sum(each.numel() * each.element_size() for each in tensors)


SHORT = {"prompt": "a red circle", "num_inference_steps": 10}


@pytest.fixture(scope="module")
def shapes():
    """The shipped model, and the most bytes that a run of it allocates."""
    model = DiffusionModel("shapes-unet")
    return model, peak_of(model, **SHORT)


def peak_of(model, *asked, **told):
    for _ in range(2):  # the first run makes what later ones have
        found = peak(lambda: model.record(**told, seed=0, capture=asked))
    return found


@pytest.mark.parametrize(
    "asked",
    [
        REQUESTS[0],
        REQUESTS[1],
        REQUESTS[8],
        {"top": 4, "reduce": []},
        {"block": "image->image", "top": 64, "reduce": []},
        {"block": "image->image", "reduce": ["steps"]},
    ],
)
def test_memory_peaks_where_the_plan_says(shapes, asked):
    """Of requests of about a megabyte and more: what surrounds them is tens of kilobytes more or less."""
    model, bare = shapes
    request = Attention(**asked)
    plan = model.plan(request, **SHORT)
    assert peak_of(model, request, **SHORT) - bare == pytest.approx(plan.bytes, rel=0.1)


def test_what_is_added_up_is_not_there_twice_at_the_end():
    """Where the maps are most of what a run takes, with no decoder after them."""
    model = DiffusionModel(tiny.sd1())
    side = 40 * model.pipeline.vae_scale_factor
    told = {**SHORT, "num_inference_steps": 2, "height": side, "width": side, "output_type": "latent"}
    request = Attention(block="image->image", reduce=["steps"])
    plan = model.plan(request, **told)
    assert peak_of(model, request, **told) - peak_of(model, **told) < 1.5 * plan.bytes


def test_layers_of_other_numbers_of_heads_are_not_reduced_together(shapes):
    model, _ = shapes
    said = r"has 2 heads and .* 4.*Reduce 'heads' as well"
    with pytest.raises(InputError, match=said):
        model.plan(Attention(reduce=["layers"]), **SHORT)
    with pytest.raises(InputError, match=said):
        model.record(**SHORT, capture=[Attention(reduce=["layers"])])


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux-cfg", "pixart"])
@pytest.mark.parametrize("asked", REQUESTS)
def test_the_bytes_are_those_of_the_maps(name, asked):
    model, arguments = opened(name)
    if name == "pixart" and asked.get("reduce") == [] and "pixels" in asked:
        asked = {**asked, "block": "image->text"}
    plan = model.plan(Attention(**asked), **arguments)
    maps = model.record(**arguments, seed=0, capture=[Attention(**asked)]).attention
    if "layers" in asked.get("reduce", ()):
        # Maps of every size are added up by themselves, and joined in the finest at the end.
        assert size(maps) <= plan.bytes <= 2 * size(maps)
    else:
        assert plan.bytes == size(maps)
    assert {each.path for each in plan.layers} >= set(maps.layers) - {"all layers"}
    assert plan.fits


@pytest.mark.parametrize("asked", [{}, {"reduce": ["heads", "steps"]}])
def test_of_two_denoisers_each_is_reckoned_with_its_own_calls(asked):
    model, arguments = opened("wan22")
    request = Attention(**asked)
    maps = model.record(**arguments, seed=0, capture=[request]).attention
    assert {path.partition(".")[0] for path in maps.layers} == {"transformer", "transformer_2"}
    tight = Attention(**asked, budget=size(maps))
    again = model.record(**arguments, seed=0, capture=[tight]).attention
    assert size(again) == size(maps)
    with pytest.raises(InputError, match="nothing was kept"):
        model.record(**arguments, seed=0, capture=[Attention(**asked, budget=size(maps) // 4)])


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
def test_the_calls_are_those_the_scheduler_makes(scheduler):
    import diffusers

    pipeline = tiny.sd1()
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    model = DiffusionModel(pipeline)
    arguments = {"prompt": "a red circle", "num_inference_steps": 6}
    plan = model.plan(Attention(), **arguments)
    maps = model.record(**arguments, seed=0, capture=[Attention()]).attention
    assert plan.calls == len(maps.rows)
    assert plan.bytes == size(maps)


def test_planning_leaves_nothing_and_says_it_by_layer():
    model, arguments = opened()
    model.record(**arguments)
    before = footprint(model.pipeline)
    plan = model.plan(Attention(), **arguments)
    assert footprint(model.pipeline) == before
    lines = str(plan).splitlines()
    assert len(lines) == len(plan.layers) + 3
    assert "KiB" in lines[-2]
    assert "4 calls; fits" in lines[-1]
    assert plan.seconds > 0


def test_a_request_over_its_budget_is_refused_with_a_narrower_one():
    model, arguments = opened()
    model.record(**arguments)
    asked = {"block": "image->image"}
    budget = model.plan(Attention(**asked, reduce=["heads", "steps"]), **arguments).bytes
    wide = Attention(**asked, reduce=[], budget=budget)
    before = footprint(model.pipeline)
    with pytest.raises(InputError, match="nothing was kept") as caught:
        model.record(**arguments, seed=0, capture=[wide])
    assert footprint(model.pipeline) == before
    plan = model.plan(wide, **arguments)
    assert not plan.fits
    narrow = plan.narrower()
    assert dict(narrow.reduce) == {"heads": "mean", "steps": "mean"}
    assert "reduce=['heads', 'steps']" in str(caught.value)
    maps = model.record(**arguments, seed=0, capture=[narrow]).attention
    assert size(maps) <= budget
    # One that needs no less than it was given goes through.
    model.record(**arguments, seed=0, capture=[Attention(**asked, reduce=[], budget=plan.bytes)])


def test_where_nothing_usual_fits_it_says_what_to_do():
    model, arguments = opened()
    with pytest.raises(InputError, match="Choose sites, steps or words"):
        model.record(**arguments, capture=[Attention(budget=10)])
    assert model.plan(Attention(budget=10), **arguments).narrower() is None


def test_a_wide_request_stops_in_the_first_call():
    model, arguments = opened()
    calls = []
    hook = model.pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(InputError, match="its budget is"):
        model.record(**arguments, capture=[Attention(budget=10)])
    hook.remove()
    assert len(calls) <= 1


def test_what_cannot_be_planned_says_so():
    model, arguments = opened("ddpm")
    with pytest.raises(InputError, match="nothing to plan"):
        model.plan(Attention(), **arguments)
    with pytest.raises(InputError, match=r"wb\.Attention"):
        model.plan("unet.mid_block")
