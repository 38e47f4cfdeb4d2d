"""Loops written by hand: those of the tutorial that takes a pipeline apart, and what can go wrong."""

import contextlib
import dis
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

import workbench as wb
from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.errors import (
    BusyError,
    GuardError,
    InputError,
    OutOfOrderError,
    TraceError,
    UnknownNameError,
)
from workbench.models import loop as loops
from workbench.models import model as models
from workbench.tracing import ambient, session

SITE = "unet.mid_block"


def unconditional():
    """The tutorial's first loop: UNet2DModel and DDPMScheduler, noise from torch's own generator."""
    pipeline = tiny.ddpm()
    model, scheduler = pipeline.unet, DDPMScheduler()

    def loop(steps=4):
        scheduler.set_timesteps(steps)
        size = model.config.sample_size
        input = torch.randn((1, 3, size, size))
        for t in scheduler.timesteps:
            with torch.no_grad():
                noisy_residual = model(input, t).sample
            previous_noisy_sample = scheduler.step(noisy_residual, t, input).prev_sample
            input = previous_noisy_sample
        image = (input / 2 + 0.5).clamp(0, 1).squeeze()
        image = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
        return Image.fromarray(image)

    return loop, {"unet": model, "scheduler": scheduler}


def guided():
    """The tutorial's second: the parts of Stable Diffusion, UniPC in place of PNDM, guidance by hand."""
    pipeline = tiny.sd1()
    vae, tokenizer = pipeline.vae, pipeline.tokenizer
    text_encoder, unet = pipeline.text_encoder, pipeline.unet
    scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)

    def loop(prompt, num_inference_steps=4, guidance_scale=7.5, generator=None):
        prompt = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompt)
        text_input = tokenizer(
            prompt,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            text_embeddings = text_encoder(text_input.input_ids)[0]
        max_length = text_input.input_ids.shape[-1]
        uncond_input = tokenizer(
            [""] * batch_size, padding="max_length", max_length=max_length, return_tensors="pt"
        )
        uncond_embeddings = text_encoder(uncond_input.input_ids)[0]
        text_embeddings = torch.cat([uncond_embeddings, text_embeddings])
        latents = torch.randn((batch_size, unet.config.in_channels, 8, 8), generator=generator)
        latents = latents * scheduler.init_noise_sigma
        scheduler.set_timesteps(num_inference_steps)
        for t in scheduler.timesteps:
            latent_model_input = torch.cat([latents] * 2)
            latent_model_input = scheduler.scale_model_input(latent_model_input, timestep=t)
            with torch.no_grad():
                noise_pred = unet(latent_model_input, t, encoder_hidden_states=text_embeddings).sample
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + guidance_scale * (noise_pred_text - noise_pred_uncond)
            latents = scheduler.step(noise_pred, t, latents).prev_sample
        latents = 1 / 0.18215 * latents
        with torch.no_grad():
            image = vae.decode(latents).sample
        image = (image / 2 + 0.5).clamp(0, 1).squeeze()
        image = (image.permute(1, 2, 0) * 255).to(torch.uint8).cpu().numpy()
        return Image.fromarray(image)

    parts = {"vae": vae, "tokenizer": tokenizer, "text_encoder": text_encoder, "unet": unet}
    return loop, {**parts, "scheduler": scheduler}


LOOPS = {"unconditional": (unconditional, {}), "guided": (guided, {"prompt": "a red circle"})}
BOTH = pytest.mark.parametrize(("make", "arguments"), LOOPS.values(), ids=LOOPS)


def bare(loop, arguments, seed):
    """The loop's own picture from a seed, without the workbench."""
    if arguments:
        return loop(**arguments, generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return loop()


@BOTH
def test_a_loop_is_the_run_it_would_be_without(make, arguments):
    loop, components = make()
    alone_picture = bare(loop, arguments, 3)
    before = footprint(SimpleNamespace(components=components))
    torch.manual_seed(11)
    alone = torch.randn(3)
    torch.manual_seed(11)
    record = wb.trace_loop(loop, components=components).record(**arguments, seed=3, capture=[SITE])
    assert torch.equal(torch.randn(3), alone)
    assert as_bytes(record.images[0]) == as_bytes(alone_picture)
    assert footprint(SimpleNamespace(components=components)) == before


@BOTH
def test_its_ledger_has_steps_branches_and_places(make, arguments):
    loop, components = make()
    record = wb.trace_loop(loop, components=components).record(**arguments, seed=0, capture=[SITE])
    scheduler = components["scheduler"]
    assert [row.timestep for row in record.ledger] == [float(t) for t in scheduler.timesteps]
    assert [row.step for row in record.ledger] == [0, 1, 2, 3]
    assert record.ledger.branches == (("uncond", "cond") if arguments else ("cond",))
    assert record.at(SITE, step=2, branch="cond").shape[0] == 1
    assert len(record.latents) == len(record.pred_x0) == 4


@BOTH
def test_patches_and_forks_are_exact(make, arguments):
    loop, components = make()
    model = wb.trace_loop(loop, components=components)
    source = model.record(**arguments, seed=0, capture=[SITE])
    same = model.record(**arguments, seed=0, interventions=[wb.Patch(SITE, source=source)])
    assert as_bytes(same.latents) == as_bytes(source.latents)
    other = model.record(**arguments, seed=1)
    patch = wb.Patch(SITE, source=source, steps=slice(2, None))
    patched = model.record(**arguments, seed=1, interventions=[patch])
    assert as_bytes(other.fork(2, interventions=[patch]).latents) == as_bytes(patched.latents)
    assert as_bytes(patched.latents[:2]) == as_bytes(other.latents[:2])
    assert as_bytes(patched.latents[2:]) != as_bytes(other.latents[2:])


@BOTH
def test_a_traced_loop_waits_where_its_values_are_read(make, arguments):
    loop, components = make()
    model = wb.trace_loop(loop, components=components)
    record = model.record(**arguments, seed=0, capture=[SITE])
    with model.generate(**arguments, seed=0) as run:
        for step in run.steps:
            torch.randn(5)
            assert torch.equal(model.unet.mid_block.output, record.at(SITE, step=step.index))
    assert as_bytes(run.latents) == as_bytes(record.latents)


def test_a_scheduler_of_any_name_makes_the_runs_values():
    loop, parts = unconditional()
    model = wb.trace_loop(loop, components={"unet": parts["unet"], "noise_scheduler": parts["scheduler"]})
    with model.generate(seed=0) as run:
        read = [(run.pred_x0.clone(), run.latents.clone()) for _ in run.steps]
    record = model.record(seed=0, capture=["latents"])
    assert as_bytes([each for _, each in read]) == as_bytes(list(record["latents"]))
    assert as_bytes(torch.stack([each for each, _ in read])) == as_bytes(record.pred_x0)


def test_prompts_in_a_loop_have_attention_and_changes_of_their_own():
    loop, components = guided()
    model = wb.trace_loop(loop, components=components)
    record = model.record("a red circle", seed=0, capture=[wb.Attention()])
    assert [word.text for word in record.attention.words][1:4] == ["a", "red", "circle"]
    double = wb.Attach(SITE, module=lambda value: 2 * value, branch="cond")
    changed = model.record("a red circle", seed=0, interventions=[double], capture=[SITE])
    plain = model.record("a red circle", seed=0, capture=[SITE])
    for branch, factor in (("cond", 2), ("uncond", 1)):
        values = [each.at(SITE, step=0, branch=branch) for each in (plain, changed)]
        assert torch.equal(factor * values[0], values[1])


def test_arguments_are_checked_like_a_pipelines():
    loop, components = guided()
    model = wb.trace_loop(loop, components=components)
    with pytest.raises(UnknownNameError, match="guidance_scale"):
        model.record("a red circle", guidance=3.0)


def test_a_block_around_a_loop_takes_captures_and_changes():
    pipeline = tiny.sd1()
    model = wb.DiffusionModel(pipeline)
    whole = model.record("a red circle", seed=0, num_inference_steps=4, capture=[SITE])
    words = whole_embeddings(pipeline)
    scheduler = pipeline.scheduler

    def loop():
        scheduler.set_timesteps(4)
        latents = whole.initial.clone()
        for t in scheduler.timesteps:
            with torch.no_grad():
                noise = pipeline.unet(torch.cat([latents] * 2), t, encoder_hidden_states=words).sample
            uncond, cond = noise.chunk(2)
            latents = scheduler.step(uncond + 7.5 * (cond - uncond), t, latents).prev_sample
        return latents

    before = footprint(pipeline)
    with model.trace_loop(capture=[SITE], branches=("uncond", "cond")) as run:
        latents = loop()
    assert footprint(pipeline) == before
    torch.testing.assert_close(latents, whole.latents[-1])
    assert run.ledger.branches == ("uncond", "cond")
    torch.testing.assert_close(run.record.at(SITE, step=3), whole.at(SITE, step=3))
    silent = wb.Attach(SITE, module=torch.zeros_like, steps=slice(2, None))
    with model.trace_loop(capture=[SITE], interventions=[silent]) as run:
        changed = loop()
        run.output = Image.new("RGB", (4, 4))
    assert run.images[0].size == (4, 4)
    assert run.record.at(SITE, step=2).abs().max() == 0
    assert run.record.at(SITE, step=1).abs().max() > 0
    assert not torch.allclose(changed, latents)
    with pytest.raises(InputError, match="Put the loop into a function"):
        run.record.fork(2)


def whole_embeddings(pipeline):
    cond, uncond = pipeline.encode_prompt("a red circle", "cpu", 1, True)
    return torch.cat([uncond, cond])


def test_a_block_that_fails_leaves_nothing_and_the_model_runs_again():
    pipeline = tiny.sd1()
    model = wb.DiffusionModel(pipeline)
    before = footprint(pipeline)
    run = model.trace_loop(capture=[SITE])

    def fail():
        with run:
            assert footprint(pipeline) != before
            with pytest.raises(BusyError):
                model.record("a red circle")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert footprint(pipeline) == before
    with pytest.raises(TraceError, match="happens once"), run:
        pass
    assert model.record("a red circle", num_inference_steps=1).images


LEAVING = {module.__file__ for module in (loops, models, session, ambient, contextlib)}
EXIT = loops.Block.__exit__.__code__
FIRST = min(entry.start for entry in dis.Bytecode(EXIT).exception_entries)
"""Before its first ``try``, a function can do nothing about an interrupt."""


class Interruption:
    """An interrupt at one opcode of what happens when a block is left.

    Args:
        point: which opcode, of the code in `LEAVING`; None is none.

    Attributes:
        points: how many there were.
    """

    def __init__(self, point=None):
        self.point, self.points, self.leaving = point, 0, False

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.called)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def called(self, frame, event, argument):
        self.leaving |= frame.f_code is EXIT
        if not self.leaving or frame.f_code.co_filename not in LEAVING:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.passed

    def passed(self, frame, event, argument):
        if event == "opcode" and (frame.f_code is not EXIT or frame.f_lasti >= FIRST):
            if self.points == self.point:
                raise KeyboardInterrupt
            self.points += 1
        return self.passed


def test_an_interrupt_at_any_opcode_of_a_blocks_end_leaves_nothing():
    pipeline = tiny.sd1()
    model = wb.DiffusionModel(pipeline)
    wanted = [SITE, wb.Attention(sites=[f"{SITE}.attentions.0.transformer_blocks.0.attn2"])]
    before = footprint(pipeline)
    with Interruption() as whole, model.trace_loop(capture=wanted):
        assert footprint(pipeline) != before
    assert whole.points > 300
    kept = []
    for point in (*range(60), *range(60, whole.points, 7)):
        # What is held cannot be tidied up by the garbage collector.
        kept.append(run := model.trace_loop(capture=wanted))
        with pytest.raises(KeyboardInterrupt) as caught, Interruption(point), run:
            pass
        kept.append(caught)
        assert footprint(pipeline) == before, point
    with model.trace_loop(capture=[SITE]):
        pass


def checkpointed():
    """A loop that does not switch gradients off, and its parts, one of which computes blocks again."""
    components = tiny.ddpm().components
    unet, scheduler = components["unet"], components["scheduler"]
    unet.enable_gradient_checkpointing()

    def loop():
        scheduler.set_timesteps(2)
        sample = torch.randn(1, 3, 16, 16)
        for t in scheduler.timesteps:
            sample = scheduler.step(unet(sample, t).sample, t, sample).prev_sample
        return sample

    return loop, components


def test_gradients_through_blocks_that_are_computed_again_are_refused_in_a_block():
    loop, components = checkpointed()
    model = wb.trace_loop(loop, components=components)
    pipeline, said = (
        SimpleNamespace(components=components),
        r"unet.*disable_gradient_checkpointing\(\).*no_grad",
    )
    loop()
    before = footprint(pipeline)
    with pytest.raises(GuardError, match=said), model.trace_loop(capture=[SITE]):
        loop()
    with pytest.raises(GuardError, match=said):
        model.record(capture=[SITE])
    assert footprint(pipeline) == before
    with torch.no_grad(), model.trace_loop(capture=[SITE]) as run:
        loop()
    assert len(run.record[SITE]) == 2
    model.unet.module.disable_gradient_checkpointing()
    silent = wb.Attach(SITE, module=torch.zeros_like)
    for changes in ([], [silent]):
        components["unet"].zero_grad()
        with model.trace_loop(capture=[SITE], interventions=changes) as run:
            loop().square().mean().backward()
        assert len(run.record[SITE]) == 2
        slope = components["unet"].mid_block.resnets[0].conv1.weight.grad
        assert (slope is None or slope.abs().max() == 0) == bool(changes)


# Which branch is which


def spoken(order, *, together, encode=True):
    """A loop whose guidance comes in an order of its own, in one call a step or in two."""
    pipeline = tiny.sd1()
    unet, scheduler = pipeline.unet, pipeline.scheduler
    ready = {text: told(pipeline, text) for text in ("a red circle", "")}

    def loop(prompt):
        words = {"cond": prompt, "uncond": ""}
        words = {name: told(pipeline, text) if encode else ready[text] for name, text in words.items()}
        scheduler.set_timesteps(2)
        latents = torch.randn(1, 4, 8, 8)
        for t in scheduler.timesteps:
            with torch.no_grad():
                if together:
                    text = torch.cat([words[name] for name in order])
                    parts = unet(torch.cat([latents] * 2), t, encoder_hidden_states=text).sample.chunk(2)
                else:
                    parts = [unet(latents, t, encoder_hidden_states=words[name]).sample for name in order]
            made = dict(zip(order, parts, strict=True))
            guided = made["uncond"] + 5 * (made["cond"] - made["uncond"])
            latents = scheduler.step(guided, t, latents).prev_sample
        return latents

    return loop, pipeline.components


@torch.no_grad()
def told(pipeline, text):
    ids = pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    return pipeline.text_encoder(ids)[0]


ORDERS = pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")])


def layout(record):
    return [row.branches for row in record.ledger.at(1)]


@ORDERS
def test_the_words_tell_a_loops_branches_whatever_their_order(order):
    for together in (True, False):
        loop, components = spoken(order, together=together)
        record = wb.trace_loop(loop, components=components).record("a red circle", seed=0)
        assert layout(record) == ([order] if together else [(name,) for name in order])


@ORDERS
def test_what_the_words_do_not_tell_is_numbered_unless_it_is_said(order):
    for together in (True, False):
        loop, components = spoken(order, together=together, encode=False)
        record = wb.trace_loop(loop, components=components).record("a red circle", seed=0)
        numbered = ("guide0", "guide1")
        assert layout(record) == ([numbered] if together else [(name,) for name in numbered])
        said = wb.trace_loop(loop, components=components, branches=order)
        assert layout(said.record("a red circle", seed=0)) == (
            [order] if together else [(name,) for name in order]
        )


# Samples and seeds


def several(count):
    _, components = unconditional()
    unet, scheduler = components["unet"], components["scheduler"]

    def loop(**settings):
        scheduler.set_timesteps(2)
        sample = torch.randn(count, 3, 16, 16)
        for t in scheduler.timesteps:
            with torch.no_grad():
                sample = scheduler.step(unet(sample, t).sample, t, sample).prev_sample
        return sample

    return loop, components


def test_how_many_samples_a_loop_makes_is_said():
    loop, components = several(2)
    with pytest.raises(InputError, match=r"makes 2 samples at once, and 1 were expected.*samples=2"):
        wb.trace_loop(loop, components=components).record(seed=0)
    record = wb.trace_loop(loop, components=components, samples=2).record(seed=0, capture=["unet.mid_block"])
    assert record.ledger.branches == ("cond",)
    assert record.at("unet.mid_block", step=0, branch="cond").shape[0] == 2


def test_a_seed_always_has_an_effect_or_is_refused():
    loop, components = several(1)
    model = wb.trace_loop(loop, components=components)
    first, again, other = (model.record(seed=seed).latents for seed in (0, 0, 1))
    assert as_bytes(first) == as_bytes(again) != as_bytes(other)
    assert model(seed=0) is not None
    with pytest.raises(InputError, match="noise from one seed"):
        model.record(seed=[0, 1])
    with pytest.raises(InputError, match="The loop takes seed"):
        wb.trace_loop(lambda prompt, seed=0: None, components=components)


# What a loop leaves out


def test_a_block_that_was_saved_cannot_be_forked_either(tmp_path):
    loop, components = several(1)
    model = wb.trace_loop(loop, components=components)
    with model.trace_loop() as run:
        loop()
    run.record.save(tmp_path / "run")
    with pytest.raises(InputError, match="Put the loop into a function"):
        wb.load_record(tmp_path / "run", model=model).fork(1)


def test_watching_a_block_changes_no_byte_of_its_loop():
    loop, components = several(1)
    model = wb.trace_loop(loop, components=components)
    torch.manual_seed(4)
    alone = loop()
    torch.manual_seed(4)
    with model.trace_loop(capture=["unet.mid_block"]) as run:
        watched = loop()
    assert as_bytes(watched) == as_bytes(alone) == as_bytes(run.latents[-1])


def test_a_scheduler_or_denoiser_that_nobody_named_is_missed():
    loop, components = guided()
    model = wb.trace_loop(loop, components={**components, "scheduler": DDPMScheduler()})
    with pytest.raises(
        OutOfOrderError, match=r"called 4 times.*stepped 0 times.*Give the scheduler"
    ) as caught:
        model.record("a red circle", seed=0)
    assert len(caught.value.record.ledger) == 4
    with pytest.raises(OutOfOrderError, match="Give the scheduler"), model.generate("a red circle", seed=0):
        pass
    other = wb.trace_loop(loop, components={**components, "unet": tiny.sd1().unet})
    with pytest.raises(OutOfOrderError, match=r"called 0 times.*Give the denoiser"):
        other.record("a red circle", seed=0)


class Bare:
    """A scheduler of one's own that returns no more than the sample."""

    timesteps = torch.tensor([500, 0])

    def step(self, output, timestep, sample):
        return sample - 0.1 * output


def test_a_scheduler_that_returns_a_bare_tensor_is_told_what_to_return():
    _, components = unconditional()
    scheduler, unet = Bare(), components["unet"]

    def loop():
        sample = torch.randn(1, 3, 16, 16)
        for t in scheduler.timesteps:
            sample = scheduler.step(unet(sample, t).sample, t, sample)

    with pytest.raises(InputError, match=r"bare tensor.*\(sample,\)"):
        wb.trace_loop(loop, components={"unet": unet, "scheduler": scheduler}).record(seed=0)


@pytest.mark.parametrize(
    ("function", "parts", "said"),
    [
        (3, ("unet", "scheduler"), "takes the function"),
        (print, ("scheduler",), "needs its denoiser.*DDPMScheduler"),
        (print, ("unet",), "needs its scheduler.*UNet2DModel"),
    ],
)
def test_what_is_no_loop_is_refused(function, parts, said):
    _, components = unconditional()
    with pytest.raises(InputError, match=said):
        wb.trace_loop(function, components={name: components[name] for name in parts})


def test_timesteps_that_a_loop_changes_on_the_way_are_told_as_each_call_begins():
    pipeline = tiny.ddpm()
    unet, scheduler = pipeline.unet, EulerDiscreteScheduler()

    def loop():
        scheduler.set_timesteps(4)
        sample = torch.randn(1, 3, unet.config.sample_size, unet.config.sample_size)
        for position in range(4):
            if position == 2:
                scheduler.timesteps[2:] /= 2
            t = scheduler.timesteps[position]
            with torch.no_grad():
                predicted = unet(scheduler.scale_model_input(sample, t), t).sample
            sample = scheduler.step(predicted, t, sample).prev_sample
        return sample

    told = []

    class Listener:
        def started(self, row):
            told.append(row.timestep)

        def ticked(self, tick, latents):
            pass

    model = wb.trace_loop(loop, components={"unet": unet, "scheduler": scheduler})
    record = model.record(seed=0, listener=Listener())
    assert told == [row.timestep for row in record.ledger] == [float(each) for each in scheduler.timesteps]


def test_a_part_in_torchscript_is_watched_from_outside():
    """A scripted module's children are in no dict of Python."""
    pipeline = tiny.sd1()
    pipeline.vae.post_quant_conv = torch.jit.trace(pipeline.vae.post_quant_conv, torch.zeros(1, 4, 8, 8))
    for scripted in (
        torch.jit.script(torch.nn.Linear(2, 2)),
        torch.jit.trace(torch.nn.ReLU(), torch.ones(1)),
    ):
        loop, components = unconditional()
        record = wb.trace_loop(loop, components={**components, "scorer": scripted}).record(seed=0)
        assert record.ledger.steps == 4
    model = wb.DiffusionModel(pipeline)
    record = model.record("a red circle", num_inference_steps=2, capture=["vae.decoder"])
    assert len(record["vae.decoder"]) == 1
    with model.generate("a red circle", num_inference_steps=2):
        assert model.vae.decoder.output.any()
        with pytest.raises(GuardError, match=r"vae\.post_quant_conv is TorchScript, which takes no hooks"):
            model.vae.post_quant_conv.output.sum()
