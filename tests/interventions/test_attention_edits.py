"""Edits of attention through the kernel: against the weights themselves, and without a trace where idle."""

from __future__ import annotations

import diffusers
import pytest
import torch

import workbench as wb
from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.errors import GuardError, InputError, OutOfOrderError, ShapeError, UnknownNameError
from workbench.models.model import DiffusionModel

CROSS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2"
LAYERS = {
    "sd1": (CROSS, "*attn2"),
    "sd3": ("transformer.transformer_blocks.0.attn", "*"),
    "flux": ("transformer.transformer_blocks.0.attn", "*"),
    "flux-cfg": ("transformer.single_transformer_blocks.0.attn", "*"),
}
# T5 puts no token before the words.
RED = {"sd1": [2], "sd3": [-46, -23], "flux": [1], "flux-cfg": [1]}
IMAGE = {"sd3": slice(0, -48), "flux": slice(24, None), "flux-cfg": slice(24, None), "sd1": slice(None)}


def opened(name):
    case = tiny.CASES[name]
    return DiffusionModel(case.build()), dict(case.arguments)


def by_weights(path, change, steps):
    """Return the same edit made by hand of the whole matrix, at the port ``probs``."""
    return wb.Attach(f"{path}:probs", steps, "cond", module=change)


def close(first, second):
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(first.latents, second.latents, strict=True)
    )


@pytest.mark.parametrize("name", list(LAYERS))
def test_reweighting_a_word_is_multiplying_its_weights(name):
    model, arguments = opened(name)
    path, _ = LAYERS[name]

    def double(probs):
        probs = probs.clone()
        probs[:, :, IMAGE[name], RED[name]] *= 3.0
        return probs

    plain = model.record(**arguments, seed=0)
    edit = wb.Reweight(path, [1, 2], words={"red": 3.0})
    edited = model.record(**arguments, seed=0, interventions=[edit])
    by_hand = model.record(**arguments, seed=0, interventions=[by_weights(path, double, [1, 2])])
    assert close(edited, by_hand)
    assert not close(edited, plain)
    assert as_bytes(edited.latents[0]) == as_bytes(plain.latents[0])


@pytest.mark.parametrize("name", list(LAYERS))
def test_an_edit_that_changes_nothing_changes_no_byte(name):
    model, arguments = opened(name)
    path, pattern = LAYERS[name]
    sites = [f"{path}:{port}" for port in ("query", "key")]
    plain = model.record(**arguments, seed=0, capture=sites)
    before = footprint(model.pipeline)
    ones = [
        wb.Reweight(pattern, words={"red": 1.0}),
        wb.InjectAttention(path, source=plain),
        wb.Scale(f"{path}:heads", factor=1.0),
        wb.Attach(f"{path}:probs", module=lambda probs: None),
    ]
    for edit in ones:
        edited = model.record(**arguments, seed=0, interventions=[edit])
        assert as_bytes(edited.latents) == as_bytes(plain.latents), edit
    assert footprint(model.pipeline) == before


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_injected_weights_are_those_of_the_source(name):
    model, arguments = opened(name)
    path, _ = LAYERS[name]
    source = model.record(
        **{**arguments, "prompt": "a blue square"},
        seed=0,
        capture=[f"{path}:{port}" for port in ("query", "key", "probs")],
    )
    probs = {step: source.at(f"{path}:probs", step=step, branch="cond") for step in range(4)}
    edited = model.record(**arguments, seed=0, interventions=[wb.InjectAttention(path, source=source)])
    by_hand = wb.Patch(f"{path}:probs", None, "cond", source=source)
    patched = model.record(**arguments, seed=0, interventions=[by_hand], capture=[f"{path}:probs"])
    assert close(edited, patched)
    plain = model.record(**arguments, seed=0)
    assert not close(edited, plain)
    assert probs[0].shape[1] == 2


def test_tokens_take_their_weights_from_others_or_keep_their_own():
    model, arguments = opened("sd1")
    source = model.record(
        "a blue square",
        seed=0,
        num_inference_steps=4,
        capture=[f"{CROSS}:{port}" for port in ("query", "key")],
    )
    tokens = torch.eye(24)
    tokens[2], tokens[3] = 0, 0
    tokens[3, [2, 3]] = 0.5
    edit = wb.InjectAttention(CROSS, 1, source=source, alignment=tokens)
    given = (
        source.at(f"{CROSS}:query", step=1, branch="cond"),
        source.at(f"{CROSS}:key", step=1, branch="cond"),
    )

    def mix(probs):
        theirs = torch.softmax(given[0] @ given[1].transpose(-1, -2) * given[0].shape[-1] ** -0.5, -1)
        mixed = theirs @ tokens.T
        mixed[..., 2] = probs[..., 2]
        return mixed

    edited = model.record(**arguments, seed=0, interventions=[edit])
    by_hand = model.record(**arguments, seed=0, interventions=[by_weights(CROSS, mix, 1)])
    assert close(edited, by_hand)
    wrong = wb.InjectAttention(CROSS, source=source, alignment=torch.eye(7))
    with pytest.raises(ShapeError, match="sees 24 tokens"):
        model.record(**arguments, interventions=[wrong])


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_a_map_that_is_forced_is_the_words_weights(name):
    model, arguments = opened(name)
    path, _ = LAYERS[name]
    columns = RED[name]
    shape = model.record(**arguments, capture=[wb.Attention(sites=[path])]).attention.layers[path].shape
    side = round(shape[-1] ** 0.5)
    wanted = torch.linspace(0, 0.9, side * side).reshape(side, side)

    def force(probs):
        probs = probs.clone()
        image = probs[:, :, IMAGE[name]]
        m = wanted.flatten()
        rest = image[..., columns].sum(-1)
        image *= ((1 - m) / (1 - rest))[..., None]
        image[..., columns] = m[:, None] / len(columns)
        probs[:, :, IMAGE[name]] = image
        assert torch.allclose(image.sum(-1), torch.ones(image.shape[:-1]), atol=1e-5)
        return probs

    edited = model.record(**arguments, seed=0, interventions=[wb.ForceMap(path, 2, word="red", map=wanted)])
    by_hand = model.record(**arguments, seed=0, interventions=[by_weights(path, force, 2)])
    assert close(edited, by_hand)
    assert not close(edited, model.record(**arguments, seed=0))


def test_other_heads_branches_and_samples_stay_to_the_bit():
    model, _ = opened("sd1")
    prompts = ["a red circle", "a red square"]
    both = {"prompt": prompts, "num_inference_steps": 3, "seed": 0, "capture": [f"{CROSS}:heads"]}
    plain = model.record(**both)
    edit = wb.Reweight(CROSS, 1, words={"square": 0.0}, heads=[1], samples=[1])
    edited = model.record(**both, interventions=[edit])
    before, after = (each.at(f"{CROSS}:heads", step=1) for each in (plain, edited))
    changed = [
        (row, head)
        for row in range(4)
        for head in range(2)
        if as_bytes(before[row, head]) != as_bytes(after[row, head])
    ]
    assert changed == [(3, 1)]
    assert as_bytes(edited.latents[:, 0]) == as_bytes(plain.latents[:, 0])


def test_the_words_are_each_samples_own():
    model, _ = opened("sd1")
    edit = wb.Reweight(words={"circle": 2.0})
    with pytest.raises(UnknownNameError, match="no word 'circle'"):
        model.record(["a red circle", "a square"], num_inference_steps=2, interventions=[edit])
    one = wb.Reweight(words={"circle": 2.0}, samples=0)
    record = model.record(["a red circle", "a square"], seed=0, num_inference_steps=2, interventions=[one])
    alone = model.record("a red circle", seed=0, num_inference_steps=2, interventions=[edit])
    assert torch.allclose(record.latents[:, :1], alone.latents, atol=1e-4)


def test_maps_of_a_run_with_injected_attention_are_the_sources():
    model, arguments = opened("sd1")
    source = model.record(
        "a blue square",
        seed=0,
        num_inference_steps=4,
        capture=[wb.Attention(sites=[CROSS]), *(f"{CROSS}:{port}" for port in ("query", "key"))],
    )
    edit = wb.InjectAttention(CROSS, source=source)
    edited = model.record(**arguments, seed=0, interventions=[edit], capture=[wb.Attention(sites=[CROSS])])
    assert torch.allclose(edited.attention.layers[CROSS], source.attention.layers[CROSS], atol=1e-6)


def test_a_fork_edits_from_its_step_on():
    model, arguments = opened("sd1")
    plain = model.record(**arguments, seed=0)
    edit = wb.Reweight(words={"red": 4.0}, steps=range(2, 4))
    whole = model.record(**arguments, seed=0, interventions=[edit])
    fork = plain.fork(2, interventions=[edit])
    assert as_bytes(fork.latents) == as_bytes(whole.latents)


def test_in_a_block_the_weights_are_read_and_replaced():
    model, arguments = opened("sd1")
    layer = model.site(CROSS)
    with model.generate(**arguments, seed=0) as run:
        for _ in run.steps[1:2]:
            probs = layer.probs
            assert torch.allclose(probs.sum(-1), torch.ones(2, 2, 16), atol=1e-5)
            probs[:, :, :, 2] = 0
            heads = layer.heads.clone()
    record = model.record(**arguments, seed=0, capture=[f"{CROSS}:probs", f"{CROSS}:value"])
    weights = record.at(f"{CROSS}:probs", step=1).clone()
    weights[:, :, :, 2] = 0
    assert torch.allclose(heads, weights @ record.at(f"{CROSS}:value", step=1), atol=1e-5)


@pytest.mark.parametrize("name", ["sd1", "sd3", "flux"])
def test_ablating_heads_is_zeroing_what_the_projection_is_given(name):
    model, arguments = opened(name)
    path, _ = LAYERS[name]
    layer = model.site(path).module
    ports = ("heads", "text_heads") if name != "sd1" else ("heads",)
    whole = model.record(**arguments, seed=0, interventions=[wb.Ablate(f"{path}:{port}") for port in ports])
    outputs = [layer.to_out[0], *([layer.to_add_out] if name != "sd1" else [])]
    hooks = [
        each.register_forward_pre_hook(lambda _module, args: (torch.zeros_like(args[0]), *args[1:]))
        for each in outputs
    ]
    silenced = model.record(**arguments, seed=0)
    for hook in hooks:
        hook.remove()
    assert as_bytes(whole.latents) == as_bytes(silenced.latents)
    assert as_bytes(whole.latents) != as_bytes(model.record(**arguments, seed=0).latents)


@pytest.mark.parametrize(("edit", "factor"), [("ablate", 0.0), ("scale", 2.5)])
def test_one_head_is_changed_as_by_hand(edit, factor):
    model, arguments = opened("sd1")
    layer = model.site(CROSS).module
    width = layer.to_out[0].in_features // layer.heads
    made = {
        "ablate": wb.Ablate(f"{CROSS}:heads", heads=1),
        "scale": wb.Scale(f"{CROSS}:heads", heads=[-1], factor=2.5),
    }[edit]
    ours = model.record(**arguments, seed=0, interventions=[made])

    def by_hand(_module, args):
        changed = args[0].clone()
        changed[..., width : 2 * width] = changed[..., width : 2 * width] * factor
        return (changed, *args[1:])

    hook = layer.to_out[0].register_forward_pre_hook(by_hand)
    theirs = model.record(**arguments, seed=0)
    hook.remove()
    assert as_bytes(ours.latents) == as_bytes(theirs.latents)


def test_one_head_is_patched():
    model, arguments = opened("sd1")
    source = model.record("a blue square", seed=0, num_inference_steps=4, capture=[f"{CROSS}:heads"])
    patch = wb.Patch(f"{CROSS}:heads", 1, heads=[0], source=source)
    kept = model.record(**arguments, seed=0, interventions=[patch], capture=[f"{CROSS}:heads"])
    plain = model.record(**arguments, seed=0, capture=[f"{CROSS}:heads"])
    site = f"{CROSS}:heads"
    assert torch.equal(kept.at(site, step=1)[:, 0], source.at(site, step=1)[:, 0])
    assert torch.equal(kept.at(site, step=1)[:, 1], plain.at(site, step=1)[:, 1])


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_with_two_calls_a_step_each_gets_its_own(scheduler):
    pipeline = tiny.sd1()
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    model = DiffusionModel(pipeline)
    arguments = {"prompt": "a red circle", "seed": 0, "num_inference_steps": 4}
    plain = model.record(**arguments, capture=[f"{CROSS}:{port}" for port in ("query", "key")])
    edited = model.record(**arguments, interventions=[wb.InjectAttention(CROSS, source=plain)])
    assert as_bytes(edited.latents) == as_bytes(plain.latents)


def test_each_sample_is_injected_with_its_own():
    model, _ = opened("sd1")
    both = {"prompt": ["a red circle", "a blue square"], "seed": 0, "num_inference_steps": 2}
    source = model.record(**both, capture=[f"{CROSS}:{port}" for port in ("query", "key")])
    edit = wb.InjectAttention(CROSS, source=source, samples=[1])
    assert as_bytes(model.record(**both, interventions=[edit]).latents) == as_bytes(source.latents)


@pytest.mark.parametrize(
    "edit",
    [
        wb.Reweight(words={"red": 2.0}),
        wb.ForceMap(word="red", map=torch.eye(4)),
        wb.Attach(f"{CROSS}:probs", module=lambda probs: probs * 1.5),
    ],
)
@pytest.mark.parametrize("port", ["output", "query"])
def test_a_derivative_through_an_edit_is_that_of_the_edited_run(edit, port):
    model, arguments = opened("sd1")
    asked = {**arguments, "seed": 0, "of": lambda latents: latents.square().mean(), "result": "latents"}
    site = f"{CROSS}:{port}"
    found = model.gradient(**asked, wrt=site, steps=1, interventions=[edit]).at(site, step=1, branch="cond")
    plain = model.gradient(**asked, wrt=site, steps=1).at(site, step=1, branch="cond")
    assert not torch.allclose(found, plain, rtol=1e-2)
    # A step along the derivative changes the edited run's result by so much.
    step, ends = 1e-2 * found / found.norm(), []
    for by in (1, -1):
        move = wb.Attach(site, module=lambda value, by=by: value + by * step, branch="cond", steps=1)
        moved = model.record(**arguments, seed=0, interventions=[edit, move])
        ends.append(moved.latents[-1].double().square().mean())
    assert float(ends[0] - ends[1]) / 2 == pytest.approx(1e-2 * float(found.norm()), rel=0.05)


def test_what_cannot_be_edited_says_so():
    model, arguments = opened("sd1")
    source = model.record(**arguments, seed=0)
    cases = [
        (lambda: wb.Reweight(words={}), InputError, "says nothing"),
        (lambda: wb.ForceMap(word="red", map=torch.ones(2)), InputError, "rows, columns"),
        (lambda: wb.ForceMap(word="red", map=torch.ones(2, 2) * 2), InputError, "from 0 to 1"),
        (lambda: wb.InjectAttention(source=source, block="text->text"), InputError, "not injected"),
        (lambda: wb.InjectAttention(source="run"), InputError, "no record"),
        (lambda: wb.Ablate(CROSS, heads=[0]), InputError, "no heads to choose from"),
        (lambda: wb.Ablate(f"{CROSS}:heads", heads=[]), InputError, "heads=.*empty"),
        (lambda: wb.Scale(CROSS, factor=float("nan")), InputError, "no finite number"),
        (lambda: wb.Reweight("", words={"red": 2.0}), InputError, "no path"),
    ]
    for make, error, said in cases:
        with pytest.raises(error, match=said):
            make()
    for edit, error, said in (
        (wb.Reweight("*attn3", words={"red": 2.0}), InputError, "No attention layer is called"),
        (wb.Reweight("*attn1", words={"red": 2.0}), OutOfOrderError, "changed nothing"),
        (wb.Reweight(words={"green": 2.0}), UnknownNameError, "no word 'green'"),
        (wb.Ablate(f"{CROSS}:heads", heads=[2]), InputError, "2 heads"),
        (wb.Ablate(f"{CROSS}:heads", heads=[0, -2]), InputError, "twice"),
        (wb.InjectAttention(CROSS, source=source), UnknownNameError, "not captured"),
    ):
        before = footprint(model.pipeline)
        with pytest.raises(error, match=said):
            model.record(**arguments, interventions=[edit])
        assert footprint(model.pipeline) == before
    masked, given = opened("pixart")
    path = "transformer.transformer_blocks.0.attn2"
    kept = masked.record(**given, seed=0, capture=[f"{path}:query", f"{path}:key"])
    with pytest.raises(GuardError, match="masks part of its keys"):
        masked.record(**given, interventions=[wb.InjectAttention(path, source=kept)])
