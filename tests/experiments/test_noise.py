"""Other initial noise in an experiment: of a seed, of one's own, in a part of the picture."""

import pytest
import torch
from pydantic import ValidationError

from tests import tiny
from tests.tiny import images
from workbench.errors import GuardError, InputError
from workbench.experiments.experiment import Experiment
from workbench.experiments.noise import NoiseSpec, check_begun
from workbench.experiments.standalone import standalone_code
from workbench.models.model import DiffusionModel

HALF = [[1.0] * 8 + [0.0] * 8] * 16


@pytest.fixture(scope="module")
def model():
    return DiffusionModel("shapes-unet")


def begun(noise, **more):
    told = {"source": "a red circle", "target": "a blue circle", "num_inference_steps": 3}
    turn = {"kind": "turn", "step": 0, "noise": noise}
    return Experiment(model="shapes-unet", **told, interventions=[turn], **more)


def unit(seed):
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_noise_of_a_seed_makes_the_run_of_that_seed(model):
    made = begun({"seed": 5}).run(model)
    plain = model.record("a blue circle", seed=5, num_inference_steps=3)
    assert torch.equal(made.patched.latents, plain.latents)
    assert not torch.equal(made.target.latents, plain.latents)


def test_a_mask_puts_it_in_its_part_alone(model):
    initial = begun({"seed": 5, "mask": HALF}).run(model).patched.initial
    assert torch.equal(initial[..., :8], unit(5)[..., :8])
    assert torch.equal(initial[..., 8:], unit(0)[..., 8:])


def test_of_a_share_the_variances_are_added(model):
    initial = begun({"seed": 5, "strength": 0.36}).run(model).patched.initial
    assert torch.allclose(initial, 0.8 * unit(0) + 0.6 * unit(5), atol=1e-6)


def test_a_value_is_taken_as_it_is(model):
    value = unit(7)[0]
    initial = begun({"value": value}).run(model).patched.initial
    assert torch.equal(initial, value[None])


def test_unit_noise_stays_unit_noise_under_a_sampler_that_scales(model):
    scaled = {"name": "EulerDiscreteScheduler", "config": dict(model.pipeline.scheduler.config)}
    experiment = begun({"seed": 5})
    config = {name: value for name, value in scaled["config"].items() if isinstance(value, (str, float, int))}
    given = experiment.model_dump() | {"scheduler": {"name": scaled["name"], "config": config}}
    outcome = Experiment.model_validate(given).run(model)
    assert float(outcome.patched.initial.std()) > 2
    expected = outcome.target.initial / unit(0) * unit(5)
    assert torch.allclose(outcome.patched.initial, expected, rtol=1e-4, atol=1e-3)


def test_its_scale_is_the_runs_own_whatever_ran_since(model):
    config = {"timestep_spacing": "leading", "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    scheduler = {"name": "EulerDiscreteScheduler", "config": config}
    experiment = begun({"seed": 5, "mask": HALF}, scheduler=scheduler)
    target = experiment.run_target(model)
    source = experiment.run_source(model, target)
    model.record("a", num_inference_steps=8)
    initial = experiment.patch(source, target).initial
    assert torch.equal(initial[..., 8:], target.initial[..., 8:])
    code = standalone_code(experiment, source, target)
    assert "mixed(drawn(0, (1, 4, 16, 16)), drawn(5, (1, 4, 16, 16))" in code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_half_precision_begins_at_noise_of_its_own_dtype(family, dtype):
    case = tiny.FAMILIES[family]
    model = DiffusionModel(case.build().to(dtype))
    run = model.record(**case.arguments, seed=0)
    half = NoiseSpec(seed=5, mask=HALF)
    for noise in (NoiseSpec(seed=5), NoiseSpec(seed=5, strength=0.5), half):
        latents = noise.latents(run)
        assert latents.dtype == dtype
        check_begun(run.fork(0, latents=latents), latents)
    other = model.record(**case.arguments, seed=5)
    assert torch.equal(run.fork(0, latents=NoiseSpec(seed=5).latents(run)).initial, other.initial)
    assert half.code(run).endswith(f".to({dtype})")


def test_a_pipelines_own_argument_called_noise_is_no_noise():
    turn = {"kind": "turn", "step": 0, "arguments": {"noise": 3}}
    told = Experiment(source="a", target="b", interventions=[turn])
    assert told.interventions[0].changes() == {"noise": 3}


def test_a_branch_begins_at_noise_of_its_own(model):
    outcome = begun({"seed": 5}).fork(0, noise={"seed": 6}).fork(2, guidance_scale=1.0).run(model)
    first, second = (branch.record.initial for branch in outcome.branches)
    assert torch.equal(first, unit(6))
    assert torch.equal(second, unit(5))


def test_packed_latents_are_drawn_as_the_pipeline_does():
    model = DiffusionModel(images.flux())
    settings = {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 8}
    told = model.record("a red circle", seed=0, **settings)
    found = NoiseSpec(seed=5).latents(told)
    other = model.record("a red circle", seed=5, **settings)
    assert torch.equal(found, other.initial)
    assert torch.equal(told.fork(0, latents=found).latents, other.latents)
    with pytest.raises(InputError, match=r"a way of its own.*format='workbench'"):
        NoiseSpec(seed=5).code(told)


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        ({}, "give one of the two"),
        ({"seed": 1, "value": [1.0]}, "give one of the two"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"seed": 1, "strength": 2.0}, "less than or equal to 1"),
        ({"seed": 1, "mask": [[0.5], [0.1, 0.2]]}, "all its rows are equally long"),
        ({"value": [float("nan")]}, "finite numbers"),
    ],
)
def test_noise_that_says_nothing_sensible_is_refused(noise, said):
    with pytest.raises(ValidationError, match=said):
        begun(noise)


def test_noise_is_of_the_first_step_alone():
    with pytest.raises(ValidationError, match="this turn is at step 2"):
        Experiment(source="a", target="b", interventions=[{"kind": "turn", "step": 2, "noise": {"seed": 1}}])
    with pytest.raises(InputError, match="this fork is at step 1"):
        begun({"seed": 5}).fork(1, noise={"seed": 6})


def test_a_value_of_another_shape_is_named(model):
    with pytest.raises(InputError, match=r"does not fit the initial noise.*\(1, 4, 16, 16\)"):
        begun({"value": torch.zeros(3, 16, 16)}).run(model)


def test_a_pipeline_without_latents_is_named():
    model = DiffusionModel("shapes-ddpm")
    run = model.record(seed=0, num_inference_steps=2)
    with pytest.raises(InputError, match="takes no latents"):
        NoiseSpec(seed=1).latents(run)


def test_a_run_that_began_elsewhere_is_refused(model):
    run = model.record("a blue circle", seed=0, num_inference_steps=2)
    check_begun(run, unit(0))
    with pytest.raises(GuardError, match="makes something else of the latents"):
        check_begun(run, unit(1))


def test_a_branch_mixes_its_noise_into_that_of_the_run_it_leaves(model):
    outcome = begun({"seed": 5}).fork(0, noise={"seed": 6, "mask": HALF}).run(model)
    initial = outcome.branches[0].record.initial
    assert torch.equal(initial, torch.cat([unit(6)[..., :8], unit(5)[..., 8:]], dim=-1))
    code = standalone_code(outcome.experiment, outcome.source, outcome.target)
    assert "branch_0_noise = mixed(changed_noise, drawn(6, (1, 4, 16, 16))" in code


def test_a_script_says_the_noise_once(model):
    outcome = begun({"seed": 5, "mask": HALF}).fork(2, guidance_scale=1.0).run(model)
    code = standalone_code(outcome.experiment, outcome.source, outcome.target)
    assert code.count("mixed(drawn(0, (1, 4, 16, 16)), drawn(5, (1, 4, 16, 16))") == 1
    assert code.count("'latents': changed_noise") == 2
