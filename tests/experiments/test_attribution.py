"""Estimates of patches, against patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.watching import as_bytes, footprint, forwards_of
from workbench.errors import InputError, UnknownNameError
from workbench.experiments.attribution import Agreement, attribute
from workbench.experiments.experiment import Experiment
from workbench.experiments.windows import window
from workbench.models.model import DiffusionModel
from workbench.models.outline import patch_sites
from workbench.models.shapes import Shapes
from workbench.tracing.session import Session

PLAIN = Experiment(source="a red circle", target="a blue square", num_inference_steps=4)
SITES = ["unet.mid_block", "unet.down_blocks.1:output[0]", "unet.up_blocks.1"]


def near(name, guidance, **further):
    """A model in float64, a target, and a source so near that a patch does what its derivative says."""
    case = tiny.CASES[name]
    model = DiffusionModel(case.build().to(torch.float64))
    arguments = {**case.arguments, "seed": 0, **further}
    source, target = (model.record(**{**arguments, guidance: scale}) for scale in (3.01, 3.0))
    return model, source, target


@pytest.fixture(scope="module")
def runs():
    model = DiffusionModel(tiny.sd1())
    target = PLAIN.run_target(model)
    return model, PLAIN.run_source(model, target), target


@pytest.mark.parametrize(
    ("name", "guidance", "sites", "branch"),
    [
        pytest.param(
            "sd1",
            "guidance_scale",
            ["unet.mid_block", "unet.down_blocks.1:output[0]", "unet.up_blocks.0.attentions.0.proj_in:input"],
            "cond",
            id="both branches in one call",
        ),
        pytest.param("sd1", "guidance_scale", ["unet.mid_block"], "all", id="every row"),
        pytest.param(
            "flux-cfg",
            "true_cfg_scale",
            [f"transformer.transformer_blocks.0:output[{part}]" for part in (0, 1)],
            "uncond",
            id="calls of their own, two streams",
        ),
        pytest.param(
            "pixart", "guidance_scale", ["transformer.transformer_blocks.0.attn2:heads"], "cond", id="heads"
        ),
    ],
)
def test_of_a_source_that_is_near_each_cell_is_what_its_patch_does(name, guidance, sites, branch):
    _, source, target = near(name, guidance)
    asked = {"branch": branch, "result": "latents", "check": len(sites) * target.ledger.steps}
    made = attribute(PLAIN, source, target, sites, **asked)
    found = made.agreement
    assert len(set(found.cells)) == len(found.cells) == made.values.size
    assert np.abs(found.exact).max() > 1e-4
    assert found.estimated == pytest.approx(found.exact, rel=3e-2, abs=3e-3 * np.abs(found.exact).max())
    # Nothing differs before the first step has been made with another guidance.
    assert not made.values[:, 0].any()


def test_a_window_is_the_sum_of_its_steps(runs):
    _, source, target = runs
    made = attribute(PLAIN, source, target, SITES)
    assert made.values.shape == (3, 4)
    assert made.agreement is None
    assert np.array_equal(made.over("1"), made.values)
    for name in ("half", "from here"):
        expected = made.values[:, list(window(name, 1, 4))].sum(1)
        assert np.allclose(made.over(name)[:, 1], expected)


def test_two_names_of_one_value_have_one_estimate_and_a_number_can_be_given(runs):
    model, source, target = runs
    last = f"unet.up_blocks.1.resnets.{len(model.pipeline.unet.up_blocks[1].resnets) - 1}"
    made = attribute(PLAIN, source, target, ["unet.up_blocks.1", last], of=lambda x0: x0[:, 1].mean())
    assert np.abs(made.values[0]).min() > 0
    assert made.values[1] == pytest.approx(made.values[0], rel=1e-4)
    default = attribute(PLAIN, source, target, ["unet.up_blocks.1"])
    assert default.values[0] != pytest.approx(made.values[0], rel=1e-2)


def test_before_the_source_leaves_the_target_nothing_moves(runs):
    model, _, target = runs
    late = PLAIN.model_copy(update={"source_from": 2})
    source = late.run_source(model, target)
    with forwards_of(model.pipeline.unet) as calls:
        made = attribute(late, source, target, SITES[:1])
    # The source's two, the target's two, and those again.
    assert len(calls) == 6
    assert not made.values[:, :2].any()
    assert made.values[:, 2:].all()
    checked = attribute(late, source, target, SITES[:1], window="to here", check=2)
    assert {step for _, step in checked.agreement.cells} == {2, 3}


def test_the_target_runs_as_it_did_and_nothing_stays(runs, monkeypatch):
    model, source, target = runs
    before, left = footprint(model.pipeline), []
    run = Session.run
    monkeypatch.setattr(Session, "run", lambda session: left.append(run(session)) or left[-1])
    attribute(PLAIN, source, target, SITES)
    again = left[-1]
    assert as_bytes(again.latents) == as_bytes(target.latents)
    # What the source's run kept was let go of on the way: all but the last step's.
    assert {each.call for kept in left[0].captured.values() for each in kept} <= {3}
    assert footprint(model.pipeline) == before
    assert torch.is_grad_enabled()


def test_on_the_way_the_denoiser_is_handed_a_mixture(runs):
    model, source, target = runs
    handed = {}

    def note(share):
        def look(_, args, kwargs):
            handed.setdefault(share, kwargs["encoder_hidden_states"].clone())

        return model.pipeline.unet.register_forward_pre_hook(look, with_kwargs=True)

    for share, run in ((0, target), (1, source)):
        handle = note(share)
        run.fork(0, interventions=())
        handle.remove()
    seen = []

    def of(x0):
        seen.append(float(x0.detach().mean()))
        return x0.mean()

    one, two = (attribute(PLAIN, source, target, SITES, of=of, points=points) for points in (1, 2))
    mixed = model.pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: (
            args,
            {**kwargs, "encoder_hidden_states": torch.lerp(handed[0], handed[1], 0.75)},
        ),
        with_kwargs=True,
    )
    between = target.fork(0, interventions=())
    mixed.remove()
    assert seen[0] == pytest.approx(float(target.pred_x0[-1].mean()))
    assert seen[2] == pytest.approx(float(between.pred_x0[-1].mean()), rel=1e-5)
    assert seen[2] != pytest.approx(seen[0], rel=1e-3)
    assert not np.allclose(two.values, one.values, rtol=1e-2)


def test_ranks_agree_on_a_trained_model():
    model = DiffusionModel("shapes-unet")
    experiment = Experiment(
        source="a green square on a light background",
        target="a purple square on a light background",
        num_inference_steps=6,
        guidance_scale=3.0,
    )
    seen = Shapes()
    target = experiment.run_target(model, capture=(seen,))
    source = experiment.run_source(model, target)
    sites = patch_sites(model.denoisers, seen)
    made = attribute(experiment, source, target, sites, check=12)
    assert made.values.shape == (17, 6)
    assert made.agreement.correlation > 0.6


def test_between_runs_that_their_noise_tells_apart_there_is_no_way(runs):
    model, _, target = runs
    other = model.record("a blue square", seed=1, num_inference_steps=4)
    attribute(PLAIN, other, target, SITES)
    with pytest.raises(InputError, match="handed the same"):
        attribute(PLAIN, other, target, SITES, points=2)


def test_between_runs_that_end_alike_there_is_no_way(runs):
    _, _, target = runs
    with pytest.raises(InputError, match="end alike"):
        attribute(PLAIN, target, target, SITES)
    assert attribute(PLAIN, target, target, SITES, of=torch.mean).values.tolist() == [[0] * 4] * 3


def test_agreement_is_of_ranks():
    agreement = Agreement("1", ((0, 0), (0, 1), (1, 0)), np.array([1.0, 2.0, 9.0]), np.array([3.0, 5.0, 6.0]))
    assert agreement.correlation == pytest.approx(1)
    flat = Agreement("1", ((0, 0), (0, 1)), np.zeros(2), np.array([1.0, 2.0]))
    assert np.isnan(flat.correlation)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"result": "images"}, InputError, "'images' is none of pred_x0, latents, noise_pred"),
        ({"check": 13}, InputError, "all 12 cells"),
        ({"check": 1}, InputError, "check=1"),
        ({"of": lambda x0: 1.0}, InputError, "returned float"),
        ({"sites": ["unet.midblock"]}, UnknownNameError, "unet.mid_block"),
        ({"sites": []}, InputError, "Name the rows"),
        ({"points": 0}, InputError, "points=0"),
        ({"window": "third", "check": 2}, UnknownNameError, "'third'"),
    ],
)
def test_what_cannot_be_estimated_is_said(runs, asked, error, said):
    model, source, target = runs
    before = footprint(model.pipeline)
    with pytest.raises(error, match=said):
        attribute(PLAIN, source, target, asked.pop("sites", SITES), **asked)
    assert footprint(model.pipeline) == before
