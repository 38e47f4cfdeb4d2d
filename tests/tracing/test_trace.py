"""The ``with`` block: ordinary Python between a pipeline's steps."""

import contextvars
import copy
import gc
import threading
import weakref

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from tests import tiny
from tests.watching import as_bytes, footprint, forwards_of
from workbench.errors import BusyError, InputError, OutOfOrderError, ShapeError, TraceError, UnknownNameError
from workbench.models.model import DiffusionModel
from workbench.tracing.by_hand import is_mark
from workbench.tracing.record import Record
from workbench.tracing.sites import Site
from workbench.tracing.storage.saved import load_record

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def whole(model):
    """The run without an edit, with everything captured that the tests read."""
    sites = ["unet.mid_block", "unet.conv_in", "unet.down_blocks.0", "text_encoder", "vae.decoder", "unet"]
    return model.record(PROMPT, num_inference_steps=4, seed=0, capture=sites)


def generate(model, **arguments):
    return model.generate(**{"prompt": PROMPT, "num_inference_steps": 4, "seed": 0, **arguments})


# Reading


def test_values_are_those_that_pass(model, whole):
    with generate(model) as run:
        seen = [model.unet.mid_block.output.save() for _ in run.steps]
    assert as_bytes(seen) == as_bytes(list(whole["unet.mid_block"]))
    assert as_bytes(run.latents) == as_bytes(whole.latents)
    assert run.images[0].tobytes() == whole.images[0].tobytes()


def test_a_value_is_a_tensor_and_what_is_computed_from_it_is_plain(model):
    with generate(model):
        value = model.unet.mid_block.output
        assert isinstance(value, torch.Tensor)
        assert type(value + 1) is type(value.mean()) is type(value[0]) is torch.Tensor
        assert type(value.chunk(2)[0]) is torch.Tensor
        assert type(value.save()) is torch.Tensor


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        (slice(None), [0, 1, 2, 3]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (slice(-2, None), [2, 3]),
        ([0, 3], [0, 3]),
        ([0, -1], [0, 3]),
        (2, [2]),
        (-1, [3]),
    ],
)
def test_steps_are_chosen_by_number_slice_and_list(model, whole, chosen, steps):
    met = []
    with generate(model) as run:
        for row in run.steps[chosen]:
            assert torch.equal(model.unet.mid_block.output, whole["unet.mid_block"][row.step])
            met.append(row.step)
    assert met == steps
    assert run.ledger == whole.ledger


def test_no_steps_are_no_error(model, whole):
    with generate(model) as run:
        assert list(run.steps[2:2]) == []
    assert as_bytes(run.latents) == as_bytes(whole.latents)


@pytest.mark.parametrize("chosen", [4, -5, [1, 9]])
def test_steps_the_run_does_not_have_are_refused(model, chosen):
    with pytest.raises(InputError, match=r"has 4 steps \(0 to 3\)"), generate(model) as run:
        list(run.steps[chosen])


@pytest.mark.parametrize("chosen", [[2, 1], [1, 1], slice(None, None, -1)])
def test_steps_that_go_back_are_refused(model, chosen):
    with pytest.raises(InputError, match="does not go forward"), generate(model) as run:
        list(run.steps[chosen])


def test_only_what_is_asked_for_has_a_hook_and_only_while_it_is(model):
    with generate(model) as run:
        for _ in run.steps[:2]:
            before = len(model.unet.mid_block.module._forward_hooks)
            model.unet.mid_block.output.clone()
            assert len(model.unet.mid_block.module._forward_hooks) == before == 0
        assert not model.unet.conv_in.module._forward_hooks


def test_modules_outside_the_denoiser_are_read_before_and_after_it(model, whole):
    with generate(model) as run:
        words = model.text_encoder.output.last_hidden_state.save()
        for _ in run.steps:
            model.unet.mid_block.output.clone()
        pixels = model.vae.decoder.output.save()
    assert as_bytes(words) == as_bytes(whole.passages("text_encoder")[0].value["last_hidden_state"])
    assert as_bytes(pixels) == as_bytes(whole["vae.decoder"][0])


def test_an_outer_module_is_read_after_its_child_while_it_is_in_flight(model, whole):
    with generate(model) as run:
        for row in run.steps[1:3]:
            inner = model.unet.mid_block.attentions[0].output[0].save()
            outer = model.unet.mid_block.output.save()
            whole_unet = model.unet.output[0].save()
            assert torch.equal(outer, whole["unet.mid_block"][row.step])
            assert torch.equal(whole_unet, whole["unet"][row.step])
            assert inner.shape == outer.shape


def test_inputs_are_read_too(model, whole):
    with generate(model) as run:
        for row in run.steps[:1]:
            args, kwargs = model.unet.inputs
            latents = model.unet.input
            assert torch.equal(args[0], latents)
            assert kwargs["encoder_hidden_states"].shape[0] == 2
            assert torch.equal(latents[:1], whole.initial)
            assert torch.equal(model.unet.conv_in.input, latents)
            assert row.branches == ("uncond", "cond")


def test_what_the_denoiser_is_called_with_is_read_after_what_comes_before_it(model, whole):
    with generate(model) as run:
        words = model.text_encoder.output[0].save()
        _, given = model.unet.inputs
        assert torch.equal(given["encoder_hidden_states"][1:], words)
    assert as_bytes(run.latents) == as_bytes(whole.latents)


def test_the_same_value_can_be_read_twice(model):
    with generate(model) as run:
        for _ in run.steps[:2]:
            assert torch.equal(model.unet.mid_block.output, model.unet.mid_block.output)


def test_a_saved_value_is_out_of_reach_of_later_edits(model, whole):
    with generate(model):
        value = model.unet.mid_block.output
        kept, structure = value.save(), model.unet.up_blocks[0].output.save()
        value.zero_()
    assert torch.equal(kept, whole["unet.mid_block"][0])
    assert structure.abs().sum() > 0


def test_tuples_and_model_outputs_can_be_saved(model):
    with generate(model) as run:
        words = model.text_encoder.output.save()
        for _ in run.steps[:1]:
            pair = model.unet.down_blocks[0].output.save()
    assert words.last_hidden_state.shape[-1] == tiny.WIDTH
    assert isinstance(pair, tuple)
    assert isinstance(pair[0], torch.Tensor)
    assert {type(words).__name__} == {"BaseModelOutputWithPooling"}


def test_a_list_can_be_saved_and_edited_as_the_models_own():
    case = tiny.FAMILIES["controlnet"]
    model = DiffusionModel(case.build())
    with model.generate(**case.arguments, seed=0):
        down, mid = model.controlnet.output
        kept, one, both = down.save(), down[0].save(), model.controlnet.output.save()
        down[0] = torch.zeros_like(down[0])
        down[1][:] = 0
        _, given = model.unet.inputs
        assert [bool(each.any()) for each in given["down_block_additional_residuals"][:3]] == [
            False,
            False,
            True,
        ]
    assert type(kept) is type(both[0]) is list
    assert {type(each) for each in (*kept, one)} == {torch.Tensor}
    assert as_bytes(kept) == as_bytes(both[0])
    assert torch.equal(kept[0], one)
    assert one.abs().max() > 0
    assert mid.ndim == 4


def test_what_is_called_before_the_denoiser_is_not_the_next_steps():
    case = tiny.FAMILIES["controlnet"]
    model = DiffusionModel(case.build())

    def read():
        with model.generate(**case.arguments, seed=0) as run:
            for _ in run.steps[1]:
                model.controlnet.output[1].save()

    with pytest.raises(OutOfOrderError, match=r"in step 1.*before the denoiser.*capture=\['controlnet'\]"):
        read()
    record = model.record(**case.arguments, seed=0, capture=["controlnet"])
    assert len(record.passages("controlnet")) == record.ledger.steps


def test_what_is_called_after_a_step_can_be_read_in_it_where_the_run_ends_early():
    case = tiny.FAMILIES["sdxl"]
    model = DiffusionModel(case.build())
    with model.generate(**{**case.arguments, "denoising_end": 0.5}, seed=0) as run:
        for _ in run.steps[1]:
            image = model.vae.decode.output.save()
    assert run.record.ledger.steps == 2
    assert image[0].ndim == 4


def test_a_preview_between_the_steps_can_be_read_in_the_step_before(model):
    def preview(pipeline, step, timestep, values):
        pipeline.vae.decode(values["latents"], return_dict=False)
        return {}

    with generate(model, callback_on_step_end=preview) as run:
        images = [model.vae.decode.output[0].save() for _ in run.steps[:2]]
    assert not torch.equal(*images)


def test_what_is_called_after_the_last_step_can_be_read_in_it(model):
    with generate(model) as run:
        for _ in run.steps[-1:]:
            image = model.vae.decode.output.save()
    assert image[0].ndim == 4


# Editing


def test_an_edit_in_place_takes_effect(model, whole):
    with generate(model) as run:
        for _ in run.steps[2:]:
            model.unet.mid_block.output[:] = 0
    assert as_bytes(run.latents[:2]) == as_bytes(whole.latents[:2])
    assert as_bytes(run.latents[2]) != as_bytes(whole.latents[2])


def test_a_replacement_takes_effect_as_the_edit_in_place_does(model):
    with generate(model) as in_place:
        for _ in in_place.steps[2:]:
            model.unet.mid_block.output.mul_(0.5)
    with generate(model) as replaced:
        for _ in replaced.steps[2:]:
            model.unet.mid_block.output = 0.5 * model.unet.mid_block.output
    with generate(model) as augmented:
        for _ in augmented.steps[2:]:
            model.unet.mid_block.output *= 0.5
    assert as_bytes(in_place.latents) == as_bytes(replaced.latents) == as_bytes(augmented.latents)


def test_the_replacement_is_what_comes_after_it(model):
    with generate(model) as run:
        for _ in run.steps[:1]:
            model.unet.conv_in.output = torch.ones_like(model.unet.conv_in.output)
            assert (model.unet.conv_in.output == 1).all()
            assert (model.unet.down_blocks[0].input == 1).all()


def test_the_denoisers_own_input_can_be_replaced(model):
    with generate(model) as run:
        for _ in run.steps[1:]:
            model.unet.input = torch.zeros_like(model.unet.input)
            assert (model.unet.conv_in.input == 0).all()


def test_an_input_can_be_replaced(model, whole):
    with generate(model) as run:
        for _ in run.steps[:1]:
            model.unet.mid_block.input = torch.zeros_like(model.unet.mid_block.input)
    assert as_bytes(run.latents[0]) != as_bytes(whole.latents[0])


def test_a_part_of_a_tuple_can_be_edited_in_place(model, whole):
    with generate(model) as run:
        for _ in run.steps[3:]:
            model.unet.output[0][:] = 0
    assert run.noise_pred[3].abs().max() == 0
    assert as_bytes(run.latents[:3]) == as_bytes(whole.latents[:3])


@pytest.mark.parametrize("new", [torch.zeros(1), torch.zeros(2, 16, 4, 4, dtype=torch.float64), 0.0, None])
def test_a_replacement_that_does_not_fit_is_refused_and_both_are_printed(model, new):
    with pytest.raises(ShapeError, match=r"unet\.mid_block is .*\(2, 16, 4, 4\) float32"), generate(model):
        model.unet.mid_block.output = new


def test_a_value_that_has_passed_cannot_be_replaced(model):
    def write_back():
        with generate(model):
            first = model.unet.conv_in.output
            model.unet.mid_block.output.clone()
            model.unet.conv_in.output = first

    with pytest.raises(OutOfOrderError, match=r"unet\.conv_in has already passed"):
        write_back()


@pytest.mark.parametrize("port", ["input", "output"])
def test_calls_of_guidance_in_two_calls_are_gone_through_one_by_one(port):
    case = tiny.CASES["flux-cfg"]
    model = DiffusionModel(case.build())
    whole = model.record(**case.arguments, seed=0, capture=[f"{case.site}:{port}"])
    seen = []
    with model.generate(**case.arguments, seed=0) as run:
        for row in run.calls:
            seen.append((row.branch, getattr(model.site(case.site), port).save()))
    assert [branch for branch, _ in seen] == ["cond", "uncond"] * 4
    assert as_bytes([value for _, value in seen]) == as_bytes(list(whole[f"{case.site}:{port}"]))


def test_calls_may_be_gone_through_without_reading():
    model = DiffusionModel(tiny.sd1(HeunDiscreteScheduler))
    with generate(model) as run:
        assert [(row.call, row.step) for row in run.calls] == list(enumerate([0, 0, 1, 1, 2, 2, 3]))
    assert len(run.calls) == len(run.ledger) == 7


def test_a_value_of_one_call_is_not_taken_for_the_nexts():
    case = tiny.CASES["flux-cfg"]
    model = DiffusionModel(case.build())

    def read_back():
        with model.generate(**case.arguments, seed=0) as run:
            for _ in run.steps[:1]:
                model.transformer.proj_out.output.clone()
                model.transformer.x_embedder.output.clone()

    with pytest.raises(OutOfOrderError, match="did not pass again in step 0, call 0"):
        read_back()


@pytest.mark.parametrize("loop", [True, False])
def test_a_value_that_has_passed_cannot_be_read(model, loop):
    def read_back(run):
        for _ in run.steps[1:2] if loop else [0]:
            model.unet.mid_block.output.clone()
            model.unet.conv_in.output.clone()

    said = (
        r"unet\.conv_in did not pass again in step \d, call \d after unet\.mid_block, which was read before "
        r"it; the run is at .*read it before what comes after it, or in the next step"
    )
    with pytest.raises(OutOfOrderError, match=said), generate(model) as run:
        read_back(run)


def test_a_module_that_is_never_called_is_never_reached(model):
    said = r"vae\.encoder was never reached; the run is at its end\. Such a run does not call it"
    with pytest.raises(OutOfOrderError, match=said), generate(model):
        model.vae.encoder.output.clone()


@pytest.mark.parametrize("loop", [True, False])
def test_a_list_of_modules_is_never_called_and_names_its_children(model, loop):
    def read(run):
        for _ in run.steps[:1] if loop else [0]:
            model.unet.down_blocks.output.clone()

    said = r"unet\.down_blocks .*A ModuleList is not called itself; ask for what is in it: 0, 1\."
    with pytest.raises(OutOfOrderError, match=said), generate(model) as run:
        read(run)


def test_after_its_end_the_run_has_nothing_more_to_read(model):
    with generate(model):
        model.vae.decoder.output.clone()
        with pytest.raises(OutOfOrderError, match="never reached; the run is at its end"):
            model.unet.mid_block.output.clone()
        with pytest.raises(
            TraceError, match=r"unet\.conv_in passes no more: the run has ended by itself, after 4"
        ):
            model.unet.conv_in.output.clone()


def test_values_are_there_only_while_the_model_runs(model):
    with pytest.raises(TraceError, match=r"unet\.mid_block has values only while"):
        model.unet.mid_block.output.clone()
    with pytest.raises(TraceError, match="only while"):
        model.unet.mid_block.output = 0


def test_the_record_is_there_only_after_the_block(model, whole):
    with generate(model) as run:
        with pytest.raises(TraceError, match=r"run\.images is there after the block"):
            run.images.copy()
        assert len(run.ledger) == 0
    assert isinstance(run.record, Record)
    assert run.ledger == whole.ledger
    with pytest.raises(UnknownNameError):
        run.frames.copy()


def test_a_value_of_the_run_that_fails_says_by_what(model):
    pipeline = tiny.sd1()
    without = DiffusionModel(pipeline)
    steps = pipeline.scheduler.step

    def broken(*_, **__):
        return steps.of_no_such_name

    def read(name):
        pipeline.scheduler.step = broken
        try:
            with without.generate(PROMPT, num_inference_steps=2) as run:
                getattr(run, name)
        finally:
            del pipeline.scheduler.step

    with pytest.raises(AttributeError, match="has no attribute 'of_no_such_name'"):
        read("latents")
    with without.generate(PROMPT, num_inference_steps=2) as run:
        for name in ("latents", "noise_pred", "pred_x0"):
            run._session.system.components.pop("scheduler", None)
            with pytest.raises(UnknownNameError, match=r"no module or method 'scheduler\.step'"):
                getattr(run, name)


def test_an_unknown_module_in_a_block_names_the_nearest(model):
    with pytest.raises(UnknownNameError, match=r"unet has no module or port 'midblock'.*'mid_block'"):
        generate(model).__class__ and model.unet.midblock.clone()
    with pytest.raises(UnknownNameError, match=r"Only the ports input, inputs, output"), generate(model):
        model.unet.mid_block.outputs = 0


def test_a_run_that_broke_off_says_by_what(model):
    def broken(*_):
        raise ArithmeticError("a broken block")

    def read_on():
        with generate(model):
            with pytest.raises(ArithmeticError):
                model.unet.output  # noqa: B018
            model.vae.decoder.output.clone()

    handle = model.unet.mid_block.module.register_forward_hook(broken)
    try:
        with pytest.raises(TraceError, match=r"ended by ArithmeticError \(a broken block\)"):
            read_on()
    finally:
        handle.remove()


def test_a_run_that_ends_before_a_step_says_after_how_many(model):
    def stop(pipeline, step, timestep, kept):
        pipeline._interrupt = step == 1
        return kept

    def go_on(run):
        for _ in run.steps:
            pass

    case = tiny.CASES["flux"]
    flux = DiffusionModel(case.build())
    said = r"The run ended by itself, after 2 steps, before step 2"
    run = flux.generate(**case.arguments, callback_on_step_end=stop)
    with pytest.raises(OutOfOrderError, match=said), run:
        go_on(run)


def test_a_structure_is_replaced_by_one_alike_only(model):
    def replace_by(change):
        with generate(model):
            hidden, skips = model.unet.down_blocks[0].output
            model.unet.down_blocks[0].output = (change(hidden), skips)

    replace_by(lambda hidden: hidden * 2)
    with pytest.raises(ShapeError, match=r"unet\.down_blocks\.0 is tuple of .*replacement is tuple of"):
        replace_by(lambda hidden: hidden[:1])


# Parts that are replaced


def replaced(model):
    """Replace the pipeline's UNet by another with other weights; return what was there."""
    old = model.pipeline.unet
    model.pipeline.unet = copy.deepcopy(old)
    with torch.no_grad():
        model.pipeline.unet.conv_out.weight.mul_(2)
    return old


def test_a_part_that_is_replaced_between_runs_is_the_one_that_is_traced():
    model = DiffusionModel(tiny.sd1())
    before = model.record(PROMPT, num_inference_steps=2, seed=0, capture=["unet.conv_out"])
    proxy = model.unet.conv_out
    old = replaced(model)
    model.pipeline.unet.train()
    after = model.record(PROMPT, num_inference_steps=2, seed=0, capture=["unet.conv_out"])
    assert not model.pipeline.unet.training
    assert len(after.ledger) == len(before.ledger) == 2
    assert as_bytes(after["unet.conv_out"]) != as_bytes(before["unet.conv_out"])
    bare = model.pipeline(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert after.images[0].tobytes() == bare.images[0].tobytes()
    with model.generate(PROMPT, num_inference_steps=2, seed=0):
        assert torch.equal(proxy.output, after["unet.conv_out"][0])
    assert model.unet.module is model.pipeline.unet
    assert not old._forward_hooks


def test_shapes_are_those_of_the_part_there_is():
    model = DiffusionModel(tiny.sd1())
    model.record(PROMPT, num_inference_steps=1)
    model.shapes = {"unet.of_old": "1"}
    replaced(model)
    model.record(PROMPT, num_inference_steps=1)
    assert "unet.of_old" not in model.shapes
    assert "unet.conv_out" in model.shapes


@pytest.mark.parametrize("part", ["unet", "scheduler", "vae"])
def test_a_part_that_is_replaced_during_a_run_is_refused(part):
    model = DiffusionModel(tiny.sd1())
    old = getattr(model.pipeline, part)
    new = copy.deepcopy(old)
    model.pipeline(PROMPT, num_inference_steps=1)
    before = footprint(model.pipeline)

    def replace_at_step_one(run):
        for row in run.steps:
            model.unet.mid_block.output.clone()
            if row.step == 1:
                setattr(model.pipeline, part, new)

    said = rf"pipeline\.{part} was replaced \({type(old).__name__} by .*Replace parts between runs"
    with pytest.raises(TraceError, match=said), generate(model) as run:
        replace_at_step_one(run)

    class Replacing:
        def started(self, row):
            if row.step == 1:
                setattr(model.pipeline, part, new)

        def ticked(self, tick, latents):
            pass

    setattr(model.pipeline, part, old)
    with pytest.raises(TraceError, match=said):
        model.record(PROMPT, num_inference_steps=3, listener=Replacing())
    setattr(model.pipeline, part, old)
    assert footprint(model.pipeline) == before
    asked = generate(model)
    setattr(model.pipeline, part, new)
    with pytest.raises(TraceError, match=said), asked:
        pass
    with generate(model, num_inference_steps=1):
        pass


# Leaving


def test_an_error_in_the_block_is_the_one_that_comes_out(model, whole):
    before = footprint(model.pipeline)
    with pytest.raises(ZeroDivisionError), generate(model):
        model.unet.mid_block.output.fill_(1 / 0)
    assert footprint(model.pipeline) == before
    assert as_bytes(model.record(PROMPT, num_inference_steps=4, seed=0).latents) == as_bytes(whole.latents)


def test_an_error_stops_the_run_where_it_is(model):
    def fail_at_step_one(run):
        with run:
            for row in run.steps:
                if row.step == 1:
                    raise KeyboardInterrupt

    with forwards_of(model.unet.module) as forwards, pytest.raises(KeyboardInterrupt):
        fail_at_step_one(generate(model))
    assert len(forwards) == 1


def test_an_error_of_the_pipeline_comes_out_of_the_block(model):
    def broken(*_):
        raise ArithmeticError("a broken block")

    handle = model.unet.mid_block.module.register_forward_hook(broken)
    try:
        with pytest.raises(ArithmeticError, match="a broken block"), generate(model):
            pass
        with pytest.raises(ArithmeticError, match="a broken block"), generate(model):
            model.vae.decoder.output.clone()
    finally:
        handle.remove()
    with generate(model):
        pass


def test_leaving_the_loop_early_is_no_error(model, whole):
    with generate(model) as run:
        for row in run.steps:
            if row.step == 1:
                break
    assert as_bytes(run.latents) == as_bytes(whole.latents)


def test_a_run_happens_once(model):
    run = generate(model)
    with run:
        pass
    with pytest.raises(TraceError, match="happens once"), run:
        pass
    with generate(model):
        pass


# Two runs at once


def test_a_second_run_is_refused_and_the_first_goes_on(model, whole):
    with generate(model) as run:
        for row in run.steps:
            if row.step == 1:
                with pytest.raises(BusyError, match="already running"):
                    model.record(PROMPT, num_inference_steps=1)
                with pytest.raises(BusyError), generate(model):
                    pass
                with pytest.raises(BusyError):
                    whole.fork(2)
            assert torch.equal(model.unet.mid_block.output, whole["unet.mid_block"][row.step])
    assert as_bytes(run.latents) == as_bytes(whole.latents)
    assert run.images[0].tobytes() == whole.images[0].tobytes()


def test_a_run_that_was_never_entered_keeps_nobody_waiting(model):
    generate(model)
    with generate(model):
        pass


def test_two_models_run_inside_each_other():
    outer, inner = DiffusionModel(tiny.sd1()), DiffusionModel(tiny.sd1())
    alone = inner.record(PROMPT, num_inference_steps=2, seed=0)
    with generate(outer) as run, generate(inner, num_inference_steps=2) as other:
        for one, two in zip(run.steps[:2], other.steps, strict=True):
            assert one.step == two.step
            assert torch.equal(outer.unet.conv_in.output[0], inner.unet.conv_in.output[0]) == (one.step == 0)
    assert as_bytes(other.latents) == as_bytes(alone.latents)


# Wherever it is written


def test_in_a_function_and_a_generator(model, whole):
    def passing():
        with generate(model) as run:
            for _ in run.steps:
                yield model.unet.mid_block.output.save()

    assert as_bytes(list(passing())) == as_bytes(list(whole["unet.mid_block"]))


def test_a_generator_that_is_left_frees_the_model(model):
    def passing():
        with generate(model) as run:
            for _ in run.steps:
                yield model.unet.mid_block.output

    before = footprint(model.pipeline)
    half_read = passing()
    next(half_read)
    half_read.close()
    assert footprint(model.pipeline) == before
    with generate(model):
        pass


def test_in_exec_and_nested_exec(model, whole):
    names = {"model": model, "generate": generate}
    code = "with generate(model) as run:\n    exec('kept = model.unet.mid_block.output.save()')\n"
    exec(f"exec({code!r})", names)
    assert torch.equal(names["kept"], whole["unet.mid_block"][0])


def test_in_a_worker_thread(model, whole):
    seen = []

    def work():
        with generate(model) as run:
            seen.extend(model.unet.mid_block.output.save() for _ in run.steps)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join(60)
    assert as_bytes(seen) == as_bytes(list(whole["unet.mid_block"]))


def test_the_spellings_of_nnsight(model, whole):
    with generate(model) as tracer:
        for _ in tracer.iter[:]:
            hidden = model.unet.mid_block.output.save()
    assert torch.equal(hidden, whole["unet.mid_block"][-1])
    with model.trace(PROMPT, seed=0) as tracer:
        hidden = model.unet.mid_block.output.save()
    assert tracer.ledger.steps == 1


# The block's own state


def test_the_blocks_grad_mode_is_its_own(model):
    assert torch.is_grad_enabled()
    with generate(model) as run:
        for _ in run.steps[:2]:
            value = model.unet.mid_block.output
            assert torch.is_grad_enabled()
            assert not value.requires_grad
            weight = torch.ones(1, requires_grad=True)
            (value * weight).sum().backward()
            assert weight.grad is not None
            with torch.no_grad():
                inside = model.unet.conv_out.output
                assert not torch.is_grad_enabled()
            assert torch.is_grad_enabled()
            assert not inside.requires_grad
    assert torch.is_grad_enabled()
    with torch.no_grad(), generate(model):
        model.unet.mid_block.output.clone()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_the_pipeline_runs_without_gradients_whatever_the_block_does(model, whole):
    with generate(model) as run:
        for row in run.steps:
            with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                value = model.unet.mid_block.output
                assert torch.is_autocast_enabled("cpu")
            assert not value.requires_grad
            assert torch.equal(value, whole["unet.mid_block"][row.step])
    assert as_bytes(run.latents) == as_bytes(whole.latents)


def test_the_pipeline_sees_the_blocks_context_variables(model):
    place = contextvars.ContextVar("place", default="nowhere")
    seen = []
    handle = model.unet.module.register_forward_pre_hook(lambda *_: seen.append(place.get()))
    token = place.set("this cell")
    try:
        with generate(model, num_inference_steps=1):
            pass
    finally:
        place.reset(token)
        handle.remove()
    assert seen == ["this cell"]


def test_a_finished_run_keeps_the_model_alive_no_longer_than_its_record():
    model = DiffusionModel(tiny.sd1())
    gone = weakref.ref(model.pipeline.unet)
    with generate(model) as run:
        model.unet.mid_block.output.clone()
    latents = run.latents
    del model, run
    gc.collect()
    assert gone() is None
    assert len(latents) == 4


def test_what_is_put_in_place_by_hand_is_marked_and_a_fork_that_would_lose_it_is_refused(model, tmp_path):
    with model.generate("a red dot", num_inference_steps=4, seed=0) as run:
        for step in run.steps[1:3]:
            model.unet.mid_block.output = 0 * model.unet.mid_block.output
            if step.index == 2:
                run.latents = 2 * run.latents
    mark = {"kind": "by hand", "sites": ["unet.mid_block", "scheduler.step:output[0]"], "steps": [1, 2]}
    assert run.spec.interventions == (mark,)
    later = run.record.fork(3)
    assert as_bytes(later.latents) == as_bytes(run.latents)
    assert later.spec.interventions == (mark,)
    loaded = load_record(run.record.save(tmp_path / "record"), model=model)
    for record in (run.record, later, loaded):
        with pytest.raises(InputError, match=r"mid_block.*step 1, step 2.*Fork at step 3 or later"):
            record.fork(0)
        assert not any(map(is_mark, record.fork(0, interventions=[]).spec.interventions))


def test_what_is_changed_by_hand_before_the_steps_or_skipped_is_marked_too(model):
    with model.generate("a red dot", num_inference_steps=2, seed=0) as run:
        site = Site("text_encoder.embeddings")
        run.replace(site, 0 * run.value(site))
    assert run.spec.interventions[0]["steps"] == [None]
    with pytest.raises(InputError, match=r"outside the steps.*interventions="):
        run.record.fork(1)
    with model.generate("a red dot", num_inference_steps=2, seed=0) as run:
        for _ in run.steps[1:2]:
            model.unet.mid_block.skip(torch.zeros(2, 16, 4, 4))
    assert run.spec.interventions[0]["steps"] == [1]


# A block that changes the model, or reads in another order


class Zeroed(torch.nn.Module):
    """A module of the user's own around one of the model's, as LoRA and quantisation put it there."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs) * 0


def test_a_module_that_the_block_exchanges_is_the_one_that_is_read():
    model = DiffusionModel(tiny.sd1())
    middle = model.pipeline.unet.mid_block.resnets[0]
    seen = []
    with generate(model) as run:
        for step in run.steps:
            if step.index == 2:
                middle.conv1 = Zeroed(middle.conv1)
            seen.append(bool(model.site("unet.mid_block.resnets.0.conv1").output.any()))
    assert seen == [True, True, False, False]


def test_a_hook_of_the_users_own_that_comes_later_is_seen_by_the_next_read():
    model = DiffusionModel(tiny.sd1())
    middle, seen = model.pipeline.unet.mid_block, []
    with generate(model) as run:
        for step in run.steps:
            if step.index == 1:
                handle = middle.register_forward_hook(lambda _module, _args, output: output * 0)
            if step.index == 3:
                middle._forward_hooks.clear()
            seen.append(bool(model.unet.mid_block.output.any()))
    handle.remove()
    assert seen == [True, False, False, True]


def test_what_is_read_first_in_a_block_belongs_to_its_call(model):
    with generate(model) as run:
        assert model.unet.inputs is not None
        assert run.sigma == run.ledger[0].sigma
        assert [row.call for row in run.calls] == [1, 2, 3]
    with generate(model) as run:
        model.unet.input = model.unet.input * 0.5
    assert run.record.spec.interventions[0]["steps"] == [0]
    with generate(model) as run:
        sigmas = [(run.noise_pred.sum(), run.sigma)[1] for _ in run.ticks]
    assert sigmas == [row.sigma for row in run.ledger]


def test_the_same_value_of_the_next_call_is_not_the_one_before(model, whole):
    with generate(model) as run:
        first = run.noise_pred.save()
        model.site("scheduler.scale_model_input").output.sum()
        second = run.noise_pred.save()
    assert torch.equal(first, whole.noise_pred[0])
    assert torch.equal(second, whole.noise_pred[1])


def test_a_module_whose_input_was_read_can_be_skipped(model):
    with generate(model) as run:
        for step in run.steps:
            given = model.unet.mid_block.input
            if step.index == 1:
                model.unet.mid_block.skip(torch.zeros_like(given))
            assert bool(model.unet.mid_block.output.any()) == (step.index != 1)


def test_reading_outside_the_block_leaves_nothing_on_the_model(model):
    before = footprint(model.pipeline)
    never = generate(model)
    with generate(model) as run:
        pass
    for closed in (run, never):
        with pytest.raises(TraceError):
            closed.value(Site("unet.mid_block"))
        with pytest.raises(TraceError):
            closed.skip("unet.mid_block", torch.zeros(1))
    assert footprint(model.pipeline) == before
