"""Derivatives, against finite differences and against a graph that is kept whole."""

import pytest
import torch

from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.errors import GuardError, InputError, OutOfOrderError, UnknownNameError
from workbench.interventions.attach import Attach
from workbench.models.model import DiffusionModel

CASES = [
    pytest.param(tiny.FAMILIES[name], id=name)
    for name in ("sd1", "sdxl", "flux-cfg", "pixart", "ddpm", "dit", "animatediff", "wan", "pix2pix")
]
SD = tiny.CASES["sd1"]


def mean(result):
    return result.mean()


def derive(pipeline, case, **asked):
    arguments = {**case.arguments, **asked}
    return DiffusionModel(pipeline).gradient(**{"of": mean, "wrt": case.site, "seed": 0, **arguments})


def shifted(pipeline, case, step, direction, by, **asked):
    """The number of a run whose activation in one step is moved: a finite difference's two ends."""
    taken = []

    def of(result):
        taken.append(mean(result).item())
        return mean(result)

    move = Attach(case.site, steps=step, module=lambda value: value + by * direction)
    derive(pipeline, case, of=of, steps=-1, interventions=[move], **asked)
    return taken[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("step", [0, 2])
def test_the_derivative_is_what_a_small_change_makes(case, step):
    pipeline = case.build().to(torch.float64)
    gradient = derive(pipeline, case, steps=step, result="latents")
    found = gradient[case.site]
    calls = [each for each in gradient.record.ledger.at(step) if case.site.startswith(each.component + ".")]
    assert found.shape[0] == len(calls)
    # The same direction in each branch's row: a change is made branch by branch.
    direction = torch.randn(found.shape[2:], generator=torch.Generator().manual_seed(1), dtype=found.dtype)
    small = 1e-3
    up, down = (shifted(pipeline, case, step, direction, by, result="latents") for by in (small, -small))
    measured = (up - down) / (2 * small)
    assert measured != 0
    assert float((found * direction).sum()) == pytest.approx(measured, rel=1e-2)


@pytest.mark.parametrize("case", CASES)
def test_the_run_is_the_same_as_without(case):
    pipeline = case.build()
    plain = DiffusionModel(pipeline).record(**case.arguments, seed=0)
    before = footprint(pipeline)
    gradient = derive(pipeline, case)
    assert as_bytes(gradient.record.latents) == as_bytes(plain.latents)
    assert as_bytes(dict(gradient.record.output)) == as_bytes(dict(plain.output))
    assert footprint(pipeline) == before
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert all(weight.grad is None for module in modules for weight in module.parameters())


def test_what_is_computed_again_gives_what_a_graph_kept_whole_gives():
    pipeline = SD.build()
    model = DiffusionModel(pipeline)
    again = derive(pipeline, SD, steps=[1, 2])
    with model.generate(**SD.arguments, seed=0, graph=slice(1, None)) as run:
        seen = [model.unet.mid_block.output for _ in run.steps[1:3]]
        image = model.vae.decode.output[0]
        whole = run.gradient(mean(image), *seen)
    assert torch.allclose(torch.stack(whole), again[SD.site], rtol=1e-4, atol=1e-9)
    assert again.value == pytest.approx(mean(image).item())
    assert run.images


def test_each_call_is_computed_once_more_and_no_other():
    pipeline = SD.build()
    calls = []
    handle = pipeline.unet.mid_block.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    derive(pipeline, SD, steps=slice(2, None))
    handle.remove()
    # Four calls, of which the last two are differentiable; then those two again, from the last on.
    assert calls == [False, False, True, True, True, True]


def test_an_edit_is_made_again_on_the_way_back():
    pipeline = SD.build().to(torch.float64)
    double = Attach(SD.site, module=lambda value: 2 * value)
    inner = "unet.mid_block.resnets.0"
    edited = derive(pipeline, SD, wrt=inner, interventions=[double], steps=3, result="latents")
    plain = derive(pipeline, SD, wrt=inner, steps=3, result="latents")
    assert not torch.allclose(edited[inner], plain[inner], rtol=0.1)
    assert edited.record.spec.interventions == (double,)


def test_a_model_whose_weights_are_frozen_is_differentiated_too():
    pipeline = SD.build()
    free = derive(pipeline, SD, steps=slice(2, None))
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    frozen = derive(pipeline, SD, steps=slice(2, None))
    assert torch.allclose(frozen[SD.site], free[SD.site], rtol=1e-4, atol=1e-9)


def test_a_result_in_the_middle_ends_the_run_there():
    gradient = derive(SD.build(), SD, steps=1, result="pred_x0", result_step=2)
    assert gradient.record.ledger.steps == 3
    assert gradient.record.output is None
    assert len(gradient.record.ticks) == 3
    assert gradient[SD.site].abs().max() > 0
    assert gradient.value == pytest.approx(float(gradient.record.pred_x0[2].mean()), rel=1e-5)


def test_what_comes_after_the_result_has_no_part_in_it():
    gradient = derive(SD.build(), SD, steps=[1, 3], result="noise_pred", result_step=2)
    assert gradient[SD.site].shape[0] == 1
    whole = derive(SD.build(), SD, wrt=[SD.site, "unet.conv_out"], steps=3, result=SD.site)
    assert whole[SD.site].abs().max() > 0
    assert whole["unet.conv_out"].abs().max() == 0


def test_one_branch_is_read_as_in_a_record():
    gradient = derive(SD.build(), SD)
    both = gradient.at(SD.site, step=1)
    assert torch.equal(gradient.at(SD.site, step=1, branch="cond"), both[1:])
    assert gradient.sites == (SD.site,)


def test_in_a_block_a_value_put_in_place_is_differentiated_by():
    model = DiffusionModel(SD.build())
    with model.generate(**SD.arguments, seed=0, graph=None) as run:
        for _ in run.steps[2:3]:
            new = torch.zeros_like(model.unet.mid_block.output).requires_grad_()
            model.unet.mid_block.output = new
        (by_new,) = run.gradient(mean(run.latents), new)
    assert by_new.shape == new.shape
    assert by_new.abs().max() > 0


def test_gradients_are_off_outside_of_the_chosen_steps():
    model = DiffusionModel(SD.build())
    with model.generate(**SD.arguments, seed=0, graph=[1]) as run:
        has = [model.unet.mid_block.output.requires_grad for _ in run.steps]
    assert has == [False, True, False, False]
    with model.generate(**SD.arguments, seed=0) as run:
        assert not any(model.unet.mid_block.output.requires_grad for _ in run.steps)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"of": lambda result: result}, InputError, r"one number.*\(1, 3, 16, 16\)"),
        ({"of": lambda result: result.detach().mean()}, InputError, "no graph"),
        ({"of": lambda result: 1.0}, InputError, "returned float"),
        ({"of": "mean"}, InputError, "'mean' is no function"),
        ({"wrt": []}, InputError, "wrt is empty"),
        ({"wrt": "unet.midblock"}, UnknownNameError, "unet.mid_block"),
        ({"steps": 9}, InputError, "has 4 steps"),
        ({"steps": [-1, 0]}, InputError, "some from the end"),
        ({"result": "vae.encode"}, OutOfOrderError, "vae.encode.*never passed"),
        ({"wrt": "vae.encoder"}, OutOfOrderError, "vae.encoder.*did not pass"),
        ({"steps": 3, "result": "latents", "result_step": 1}, OutOfOrderError, "did not pass in the steps"),
    ],
)
def test_what_cannot_be_differentiated_is_said_and_leaves_nothing(asked, error, said):
    pipeline = SD.build()
    pipeline(**SD.arguments)
    before = footprint(pipeline)
    with pytest.raises(error, match=said):
        derive(pipeline, SD, **asked)
    assert footprint(pipeline) == before
    assert torch.is_grad_enabled()


def test_gradient_checkpointing_is_refused_by_name():
    pipeline = SD.build()
    pipeline.unet.enable_gradient_checkpointing()
    model = DiffusionModel(pipeline)
    said = r"unet.*disable_gradient_checkpointing\(\)"
    with pytest.raises(GuardError, match=said):
        derive(pipeline, SD)
    with pytest.raises(GuardError, match=said), model.generate(**SD.arguments, graph=None):
        pass
    model.unet.module.disable_gradient_checkpointing()
    assert derive(pipeline, SD)[SD.site].abs().max() > 0


def test_in_a_block_without_a_graph_a_derivative_is_refused():
    model = DiffusionModel(SD.build())
    with model.generate(**SD.arguments, seed=0) as run:
        hidden = model.unet.mid_block.output
        with pytest.raises(InputError, match="graph=steps"):
            run.gradient(mean(hidden), hidden)
    with model.generate(**SD.arguments, seed=0, graph=None) as run:
        late = [model.unet.mid_block.output for _ in run.steps]
        with pytest.raises(InputError, match="does not depend"):
            run.gradient(mean(late[0]), late[1])
