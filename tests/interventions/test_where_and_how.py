"""Where in a value a change is made, how much of it, and what stands for nothing."""

import pytest
import torch

import workbench as wb
from tests import tiny
from workbench.errors import InputError, NotFiniteError, OutOfOrderError, ShapeError, UnknownNameError
from workbench.interventions.intervention import spread
from workbench.models.model import DiffusionModel

MIDDLE = "unet.mid_block"
WORDS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
HIDDEN = "unet.mid_block.attentions.0.transformer_blocks.0"
HEADS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2:heads"
ENCODED = "text_encoder:output.last_hidden_state"
BEFORE = f"{HIDDEN}:input"
SITES = (MIDDLE, WORDS, HIDDEN, HEADS, BEFORE)


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def run(model, prompt, *interventions, seed=0):
    return model.record(
        prompt, seed=seed, num_inference_steps=3, capture=SITES, interventions=list(interventions)
    )


@pytest.fixture(scope="module")
def source(model):
    return run(model, "a red circle", seed=1)


@pytest.fixture(scope="module")
def target(model):
    return run(model, "a blue square")


def first(record, site):
    return record.at(site, step=0, branch="cond")


def test_only_the_places_that_are_named_change(model, source, target):
    patched = run(model, "a blue square", wb.Patch(WORDS, 0, "cond", source=source, tokens=[2, -1]))
    new, old, given = (first(each, WORDS)[0] for each in (patched, target, source))
    assert torch.equal(new[[2, 23]], given[[2, 23]])
    kept = [place for place in range(24) if place not in (2, 23)]
    assert torch.equal(new[kept], old[kept])


def test_places_of_the_source_go_to_others_here(model, source):
    moved = wb.Patch(WORDS, 0, "cond", source=source, tokens=[2, 3], from_tokens=[5, 1])
    assert torch.equal(
        first(run(model, "a blue square", moved), WORDS)[0][[2, 3]], first(source, WORDS)[0][[5, 1]]
    )
    one = wb.Patch(WORDS, 0, "cond", source=source, tokens=[2, 3], from_tokens=5)
    found = first(run(model, "a blue square", one), WORDS)[0]
    assert torch.equal(found[2], first(source, WORDS)[0][5])
    assert torch.equal(found[3], found[2])


def test_heads_and_places_are_chosen_together(model, target):
    ablated = run(model, "a blue square", wb.Ablate(HEADS, 0, "cond", heads=[1], tokens=[0]))
    new, old = first(ablated, HEADS)[0], first(target, HEADS)[0].clone()
    assert not new[1, 0].any()
    assert old[1, 0].any()
    old[1, 0] = 0
    assert torch.equal(new, old)


def test_a_step_and_a_site_of_the_source_may_be_others(model, source):
    early = wb.Patch(MIDDLE, branch="cond", source=source, from_step=0)
    patched = run(model, "a blue square", early)
    assert all(
        torch.equal(patched.at(MIDDLE, step=step, branch="cond"), first(source, MIDDLE)) for step in range(3)
    )
    crossed = wb.Patch(HIDDEN, 0, "cond", source=source, from_site=BEFORE)
    assert torch.equal(first(run(model, "a blue square", crossed), HIDDEN), first(source, BEFORE))
    with pytest.raises(UnknownNameError, match="was not captured"):
        wb.Patch(HIDDEN, source=source, from_site="unet.conv_in")


def test_a_mask_says_where_in_the_picture_at_any_size(model, source, target):
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    for site in (MIDDLE, HIDDEN, HEADS):
        new, old, given = (
            first(each, site)[0]
            for each in (
                run(model, "a blue square", wb.Patch(site, 0, "cond", source=source, mask=mask)),
                target,
                source,
            )
        )
        if site != MIDDLE:  # (…, places, width), the places row by row
            side = int(new.shape[-2] ** 0.5)
            new, old, given = (each.unflatten(-2, (side, side)).movedim(-1, 0) for each in (new, old, given))
        half = new.shape[-1] // 2
        assert torch.equal(new[..., :half], given[..., :half])
        assert torch.equal(new[..., half:], old[..., half:])


def test_a_mask_of_another_shape_than_the_picture_is_laid_over_all_of_it():
    """Of a picture of 8 by 16 latents; and a mask that is as wide as high says nothing of how that lies."""
    model = wb.DiffusionModel(tiny.sd1())
    row = model.record("a red dot", height=16, width=32, num_inference_steps=1, seed=0).ledger[0]
    assert row.picture == (8, 16)
    for mask in ([[1.0, 0.0, 0.0, 0.0]], [[1.0, 0.0, 0.0, 0.0]] * 4):
        share = spread(torch.tensor(mask), torch.zeros(1, 128, 3), row, site="unet.x").reshape(8, 16)
        assert (share[:, :2] == 1).all()
        assert (share[:, 6:] == 0).all()
    assert spread(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 32, 3), row, site="unet.x").sum() == 16


@pytest.mark.parametrize(
    ("site", "says"),
    [
        (WORDS, "24 places of .* tokens of a text"),
        (f"{HIDDEN}.attn2:key", "tokens of a text"),
        ("unet.time_embedding", "no picture"),
    ],
)
def test_a_mask_is_refused_where_text_passes(model, site, says):
    with pytest.raises(InputError, match=says):
        run(model, "a blue square", wb.Ablate(site, mask=torch.ones(2, 2)))


def test_a_mask_is_laid_over_the_tokens_of_a_packed_picture_and_refused_where_text_is_beside_it():
    model = wb.DiffusionModel(tiny.flux())
    given = {"height": 16, "width": 32, "max_sequence_length": 24, "num_inference_steps": 1, "seed": 0}
    block = "transformer.transformer_blocks.0.ff"
    mask = wb.Ablate(block, mask=torch.tensor([[1.0, 0.0]]))
    rows, columns = model.record("a dot", **given).ledger[0].picture
    assert columns == 2 * rows
    kept = model.record("a dot", capture=[block], interventions=[mask], **given)[block][0, 0]
    ablated = (kept == 0).all(-1).reshape(rows, columns)
    assert ablated[:, : columns // 4].all()
    assert not ablated[:, columns // 2 :].any()
    single = wb.Ablate("transformer.single_transformer_blocks.0.norm:output[0]", mask=torch.ones(2, 2))
    with pytest.raises(InputError, match="a text of 24 and the picture in one"):
        model.record("a dot", interventions=[single], **given)


def test_strength_goes_part_of_the_way(model, source, target):
    half = run(model, "a blue square", wb.Patch(MIDDLE, 0, "cond", source=source, strength=0.5))
    torch.testing.assert_close(first(half, MIDDLE), (first(source, MIDDLE) + first(target, MIDDLE)) / 2)
    none = run(model, "a blue square", wb.Patch(MIDDLE, source=source, strength=0))
    assert torch.equal(none.latents, target.latents)


def test_an_edit_of_attention_acts_in_part_and_in_a_place(model, target):
    whole = wb.Reweight(f"{HIDDEN}.attn2", 0, words={"blue": 40.0})
    mask = torch.zeros(8, 8)
    mask[:4] = 1
    full, half, masked = (
        first(run(model, "a blue square", edit), HEADS)
        for edit in (
            whole,
            wb.Reweight(f"{HIDDEN}.attn2", 0, words={"blue": 40.0}, strength=0.5),
            wb.Reweight(f"{HIDDEN}.attn2", 0, words={"blue": 40.0}, mask=mask),
        )
    )
    plain = first(target, HEADS)
    assert not torch.allclose(full, plain)
    torch.testing.assert_close(half, (full + plain) / 2)
    upper = plain.shape[2] // 2
    torch.testing.assert_close(masked[:, :, :upper], full[:, :, :upper])
    assert torch.equal(masked[:, :, upper:], plain[:, :, upper:])


@pytest.mark.parametrize("how", ["mean", "resample", "noise"])
def test_what_stands_for_nothing(model, source, target, how):
    references = () if how == "noise" else (source, target)
    ablated = first(
        run(model, "a blue square", wb.Ablate(MIDDLE, 0, "cond", how=how, references=references)), MIDDLE
    )
    values = [first(source, MIDDLE), first(target, MIDDLE)]
    if how == "mean":
        torch.testing.assert_close(ablated, (values[0] + values[1]) / 2)
    elif how == "resample":
        assert any(torch.equal(ablated, value) for value in values)
    else:
        old = values[1]
        assert abs(float(ablated.mean() - old.mean())) < 0.2 * float(old.std())
        assert abs(float(ablated.std() / old.std()) - 1) < 0.2
        assert abs(float(torch.corrcoef(torch.stack([ablated.flatten(), old.flatten()]))[0, 1])) < 0.2


@pytest.mark.parametrize("method", ["mean", "pca"])
def test_steering_goes_from_some_runs_towards_others(model, source, target, method):
    steer = wb.Steer.between(MIDDLE, [source], [target], steps=[0], branch="cond", method=method)
    moved = first(run(model, "a blue square", steer), MIDDLE)
    torch.testing.assert_close(moved, first(source, MIDDLE), rtol=1e-4, atol=1e-4)
    twice = wb.Steer(MIDDLE, 0, "cond", direction=steer.direction, strength=2)
    found = first(run(model, "a blue square", twice), MIDDLE)
    torch.testing.assert_close(found - first(target, MIDDLE), 2 * steer.direction[None], rtol=1e-3, atol=1e-3)


def test_the_first_component_is_that_of_the_differences():
    from workbench.tracing.ledger import Ledger, Row
    from workbench.tracing.record import Passage, Record, RunSpec

    def record(value):
        row = Row(
            call=0, tick=0, step=0, timestep=0.0, sigma=None, branches=("cond",), component="unet", samples=1
        )
        ledger = Ledger()
        ledger.add(row)
        return Record(RunSpec(), ledger=ledger, captured={MIDDLE: [Passage(0, torch.tensor([value]))]})

    towards = [record([3.0, 0.1]), record([1.0, -0.1]), record([2.0, 0.0])]
    away = [record([0.0, 0.0])] * 3
    steer = wb.Steer.between(MIDDLE, towards, away, method="pca")
    assert steer.direction[0] == pytest.approx(2.0, rel=0.01)
    assert abs(float(steer.direction[1])) < 0.1


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda s: wb.Scale(MIDDLE, 1, factor=3e38), NotFiniteError, "Scale at unet.mid_block.*step 1"),
        (
            lambda s: wb.Scale(MIDDLE, 1, factor=1e30),
            NotFiniteError,
            "after step 1; .*Scale at unet.mid_block",
        ),
        (lambda s: wb.Reweight(words={"blue": 1e300}), NotFiniteError, "Reweight at .*attn2.*step 0"),
        (lambda s: wb.Patch(MIDDLE, source=s, from_site=WORDS), ShapeError, "at unet.mid_block.*from_site"),
        (lambda s: wb.Scale(ENCODED, factor=0.0), OutOfOrderError, "outside of the denoising steps"),
        (lambda s: wb.Attach(MIDDLE, module=lambda v: v / 0), NotFiniteError, "Attach at.*step 0"),
        (lambda s: wb.Ablate(MIDDLE, tokens=[0]), InputError, "no sequence"),
        (lambda s: wb.Ablate(WORDS, tokens=[24]), InputError, "24 places"),
        (lambda s: wb.Steer(MIDDLE, direction=torch.zeros(7)), ShapeError, r"\(7,\) float32"),
        (lambda s: wb.Ablate("unet.time_embedding", mask=torch.ones(2, 2)), InputError, "no picture"),
    ],
)
def test_what_cannot_be_done_in_a_run_says_where(model, source, change, error, says):
    with pytest.raises(error, match=says):
        run(model, "a blue square", change(source))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda s: wb.Patch(WORDS, source=s, from_tokens=1), InputError, "where they go"),
        (lambda s: wb.Patch(MIDDLE, source=s, from_step=9), InputError, "9"),
        (lambda s: wb.Ablate(MIDDLE, mask=torch.ones(2)), InputError, "rows, columns"),
        (lambda s: wb.Ablate(MIDDLE, mask=2 * torch.ones(2, 2)), InputError, "from 0 to 1"),
        (lambda s: wb.Ablate(MIDDLE, strength=float("nan")), InputError, "strength=nan"),
        (lambda s: wb.Ablate(MIDDLE, how="nil"), UnknownNameError, "how='nil'"),
        (lambda s: wb.Ablate(MIDDLE, how="mean"), InputError, "references"),
        (lambda s: wb.Ablate(MIDDLE, references=[s]), InputError, "references"),
        (lambda s: wb.Steer(MIDDLE, direction=1.0), InputError, "direction is a tensor"),
        (lambda s: wb.Steer.between(MIDDLE, [s], []), InputError, "give pairs"),
        (lambda s: wb.Reweight(words={"a": 2.0}, tokens=[1]), InputError, "names words"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_run(source, change, error, says):
    with pytest.raises(error, match=says):
        change(source)
