"""Interventions as data: what they become, in which order, and which are refused."""

import json

import pytest
import torch
from pydantic import ValidationError

import workbench as wb
from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, NotFiniteError, OutOfOrderError, UnknownNameError
from workbench.experiments.changes import ForceMapSpec, InjectSpec, ReweightSpec, TurnSpec, by_kind
from workbench.experiments.experiment import Experiment
from workbench.experiments.site_changes import (
    AblateSpec,
    CorruptSpec,
    ModuleSpec,
    PatchSpec,
    ReplaceSpec,
    ScaleSpec,
    SteerSpec,
)
from workbench.interventions.scale import Scale
from workbench.models.model import DiffusionModel

MIDDLE = "unet.mid_block"
HIDDEN = "unet.mid_block.attentions.0.transformer_blocks.0"
LAYER = f"{HIDDEN}.attn2"
EACH = (
    PatchSpec(site=f"{LAYER}.to_v", words=("circle",), from_words=("square",), steps=(0, 1)),
    AblateSpec(site=MIDDLE, how="mean", references=("a cross",), strength=0.5),
    ScaleSpec(site=f"{LAYER}:heads", heads=(1,), factor=0.0, branch="cond"),
    SteerSpec(site="unet.conv_in", pairs=(("a red cross", "a cross"),), steps=(1,)),
    SteerSpec(site="unet.conv_in", direction=torch.tensor([[[0.1]], [[0.2]]]).repeat(4, 1, 1), steps=(2,)),
    CorruptSpec(words=("circle",), seed=3),
    ReplaceSpec(site=f"{LAYER}.to_k", tokens=(2,), value=[0.5], branch="cond"),
    ModuleSpec(site="unet.conv_out", module="torch:tanh"),
    ModuleSpec(
        site="unet.conv_in", module="tests.experiments.test_changes:Pairs", arguments={}, feature=1, times=0
    ),
    ReweightSpec(site=LAYER, words={"circle": 3.0}),
    InjectSpec(site=LAYER, steps=(0,)),
    ForceMapSpec(site=LAYER, word="circle", map=((0.0, 1.0), (0.0, 0.5)), steps=(2,)),
    TurnSpec(step=2, prompt="a red circle", guidance_scale=2.0),
)


class Pairs(torch.nn.Module):
    """An autoencoder whose features are what it is given, doubled."""

    def encode(self, value):
        return value * 2

    def decode(self, features):
        return features / 2


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


def experiment(*interventions, **changes):
    given = {"source": "a red square", "target": "a blue circle", "num_inference_steps": 3, **changes}
    return Experiment(interventions=interventions, **given)


def test_every_kind_runs_alone_and_all_of_them_in_order_and_through_json(model, tmp_path):
    assert {each.kind for each in EACH} == set(by_kind())
    whole = experiment(*EACH)
    assert Experiment.load(whole.save(tmp_path / "experiment.json")) == whole
    plain = experiment().run(model).target
    for each in EACH:
        outcome = experiment(each).run(model, allow_code=True)
        assert as_bytes(outcome.target.images) == as_bytes(plain.images)
        assert not torch.equal(outcome.patched.latents[-1], plain.latents[-1]), each.kind
    found = whole.run(model, allow_code=True)
    turned = found.patched.spec
    assert turned.arguments["prompt"] == "a red circle"
    assert turned.forked_at == 2
    assert [type(edit).__name__ for edit in turned.interventions] == [
        *("Patch", "Ablate", "Scale", "Steer", "Steer", "Corrupt", "Replace", "Attach", "Feature"),
        *("Reweight", "InjectAttention", "ForceMap"),
    ]


def test_a_direction_of_ones_own_and_noise_are_what_the_interventions_are(model):
    target = experiment().run(model).target
    direction = torch.linspace(-1, 1, 16).reshape(16, 1, 1)
    steer = SteerSpec(site=MIDDLE, direction=direction, strength=2.0)
    assert SteerSpec.model_validate_json(steer.model_dump_json()) == steer
    own = wb.Steer(MIDDLE, direction=direction, strength=2.0)
    mask = torch.tensor([[0.0, 1.0]])
    noise = wb.Corrupt("unet.conv_in", slice(1, None), mask=mask, seed=4)
    value = torch.linspace(0, 1, 16 * 4 * 4).reshape(16, 4, 4)
    replace = ReplaceSpec(site=MIDDLE, value=value, branch="cond", strength=0.5)
    put = wb.Replace(MIDDLE, value=value, branch="cond", strength=0.5)
    corrupting = [(CorruptSpec.of(each, 3), each) for each in (noise, wb.Corrupt())]
    pairs = [(steer, own), (replace, put), *corrupting]
    for change, edit in pairs:
        assert as_bytes(experiment(change).run(model).patched.latents) == as_bytes(
            target.fork(0, interventions=[edit]).latents
        )
    with pytest.raises(InputError, match="samples"):
        CorruptSpec.of(wb.Corrupt(samples=1), 3)


@pytest.mark.parametrize(
    "direction", [(), [[]], 1.0, [float("nan")], [[1.0], [1.0, 2.0]], {"a": 1}, ["x"], [1e400]]
)
def test_a_direction_that_is_none_is_refused(direction):
    with pytest.raises(ValidationError, match=r"numbers"):
        SteerSpec(site=MIDDLE, direction=direction)
    with pytest.raises(ValidationError, match="one of the two"):
        SteerSpec(site=MIDDLE, direction=[1.0], pairs=(("a cross", "a circle"),))


def test_words_are_the_places_of_their_tokens_in_each_prompt(model):
    edit = experiment(EACH[0]).run(model).patched.spec.interventions[0]
    by_hand = model.words("a blue circle")["tokenizer"].of("circle")
    theirs = model.words("a red square")["tokenizer"].of("square")
    assert edit.tokens(24) == by_hand
    assert edit.from_tokens(24) == theirs
    with pytest.raises(UnknownNameError, match="no word 'star'"):
        experiment(ScaleSpec(site=f"{LAYER}.to_v", words=("star",), factor=0.0)).run(model)


def test_a_feature_changes_by_what_it_says(model):
    kept = experiment().run(model, capture=("unet.conv_out",)).target
    off = ModuleSpec(
        site="unet.conv_out", module="tests.experiments.test_changes:Pairs", arguments={}, feature=0, times=0
    )
    record = model.record(
        "a blue circle",
        seed=0,
        num_inference_steps=3,
        capture=["unet.conv_out"],
        interventions=experiment(off).bound(kept, kept, allow_code=True),
    )
    new, old = record.at("unet.conv_out", step=0), kept.at("unet.conv_out", step=0).clone()
    old[..., 0] = 0
    torch.testing.assert_close(new, old)


def test_the_source_may_be_another_models(tmp_path):
    folders = [tmp_path / name for name in ("base", "tuned")]
    tiny.sd1().save_pretrained(folders[0])
    other = tiny.sd1()
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(1.5)
    other.save_pretrained(folders[1])
    outcome = experiment(
        PatchSpec(site=MIDDLE), model=str(folders[0]), source_model=str(folders[1]), source="a blue circle"
    ).run()
    tuned = DiffusionModel(folders[1]).record(
        "a blue circle", seed=0, num_inference_steps=3, capture=[MIDDLE]
    )
    assert as_bytes(outcome.source.images) == as_bytes(tuned.images)
    base = DiffusionModel(folders[0])
    by_hand = base.record(
        "a blue circle", seed=0, num_inference_steps=3, interventions=[wb.Patch(MIDDLE, source=tuned)]
    )
    assert as_bytes(outcome.patched.images) == as_bytes(by_hand.images)
    assert as_bytes(outcome.patched.images) != as_bytes(outcome.target.images)


def test_branches_leave_the_changed_run_and_each_other(model):
    grown = experiment(ScaleSpec(site=MIDDLE, factor=0.5))
    grown = grown.fork(1, prompt="a red cross").fork(2, interventions=[AblateSpec(site=MIDDLE)])
    nested = {"step": 2, "guidance_scale": 2.0}
    data = grown.model_dump()
    data["forks"][0]["forks"] = [nested]
    outcome = Experiment.model_validate(data).run(model)
    first, second = outcome.branches
    by_hand = outcome.patched.fork(1, prompt="a red cross")
    assert as_bytes(first.record.images) == as_bytes(by_hand.images)
    assert as_bytes(first.branches[0].record.images) == as_bytes(by_hand.fork(2, guidance_scale=2.0).images)
    edits = [*outcome.patched.spec.interventions, wb.Ablate(MIDDLE, steps=(2,))]
    assert as_bytes(second.record.images) == as_bytes(outcome.patched.fork(2, interventions=edits).images)
    images = [outcome.patched, first.record, first.branches[0].record, second.record]
    assert len({each.images[0].tobytes() for each in images}) == 4
    with pytest.raises(InputError, match="a fork changes something"):
        grown.fork(1)


def test_an_experiment_is_of_the_weights_it_says(model):
    pinned = experiment().pinned(model)
    pinned.run(model)
    changed = DiffusionModel(tiny.sd1())
    with torch.no_grad():
        changed.components["unet"].conv_in.bias.add_(1e-3)
    with pytest.raises(InputError, match=r"of weights sha256:.*has sha256:"):
        pinned.run(changed)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ((PatchSpec(site=MIDDLE), AblateSpec(site=MIDDLE, steps=(1,))), "ablate .number 1.*patch .number 0"),
        ((TurnSpec(step=2, prompt="a"), TurnSpec(step=1, prompt="b")), "turns go forward"),
        ((PatchSpec(site=MIDDLE, steps=(-1,)), ReplaceSpec(site=MIDDLE, steps=(2,), value=[1.0])), "replace"),
        ((InjectSpec(site=LAYER, steps=(0, 1)), InjectSpec(site=LAYER, steps=(1,))), "inject .number 1"),
        ((ForceMapSpec(word="a", map=((1.0,),)), ForceMapSpec(word="a", map=((0.5,),))), "force_map"),
    ],
)
def test_of_two_that_undo_each_other_none_is_meant(changes, says):
    with pytest.raises(ValidationError, match=says):
        experiment(*changes)


@pytest.mark.parametrize(
    ("first", "wiped"),
    [
        (ScaleSpec(site=MIDDLE, factor=2.0, steps=(0, 2)), True),
        (AblateSpec(site=MIDDLE, strength=0.5), True),
        (ScaleSpec(site=MIDDLE, factor=2.0, branch="uncond"), True),
        (ScaleSpec(site="unet.conv_in", factor=2.0), False),
    ],
)
def test_what_overwrites_the_whole_comes_first(first, wiped):
    whole = PatchSpec(site=MIDDLE, steps=(0, 1, 2))
    experiment(whole, first)
    experiment(first, PatchSpec(site=MIDDLE, steps=(1,), branch="cond"))
    if wiped:
        with pytest.raises(ValidationError, match=r"patch .number 1.*number 0.*nothing would be left"):
            experiment(first, whole)
    else:
        experiment(first, whole)


def test_words_and_places_are_not_taken_for_one_another():
    site = f"{LAYER}.to_v"
    experiment(PatchSpec(site=site, words=("circle",)), AblateSpec(site=site, tokens=(0,)))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"branch": "condd"}, UnknownNameError, "no branch 'condd'.*'cond'"),
        ({"branch": "guide7"}, OutOfOrderError, "no branch 'guide7'.*'cond'"),
        ({"site": "vae.encoder.conv_in"}, OutOfOrderError, "was not called"),
        (
            {"site": "text_encoder:output.last_hidden_state"},
            OutOfOrderError,
            "outside of the denoising",
        ),
        ({"factor": 1e30}, NotFiniteError, "latents are not finite after step 0.*Scale at unet.mid_block"),
        ({"site": f"{HIDDEN}.attn1.to_v", "words": ("blue",)}, InputError, "does not carry it"),
    ],
)
def test_a_change_that_does_nothing_or_too_much_is_no_result(model, changes, error, says):
    with pytest.raises(error, match=says):
        experiment(ScaleSpec(**{"site": MIDDLE, "factor": 0.0, **changes})).run(model)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (TurnSpec(step=9, prompt="a"), "a turn at 9"),
        (PatchSpec(site=MIDDLE, from_step=99), "from_step=99"),
        ({"forks": ({"step": 9, "prompt": "a"},)}, "a fork at 9"),
        (
            {"forks": ({"step": 2, "interventions": [AblateSpec(site=MIDDLE, steps=(0, 1))]},)},
            "begins at step 2",
        ),
    ],
)
def test_what_no_step_has_is_refused_before_anything_runs(model, monkeypatch, changes, says):
    monkeypatch.setattr(model, "record", None)
    with pytest.raises(InputError, match=says):
        (experiment(**changes) if isinstance(changes, dict) else experiment(changes)).run(model)


def test_words_are_those_of_the_prompt_that_is_running(model):
    found = experiment(
        ScaleSpec(site=f"{LAYER}.to_v", words=("circle",), factor=0.0),
        TurnSpec(step=1, prompt="a blue blue circle"),
        TurnSpec(step=2, guidance_scale=2.0),
        forks=({"step": 2, "prompt": "circle"},),
    ).run(model)

    def columns(prompt):
        return model.words(prompt)["tokenizer"].of("circle")

    length = len(model.words("a")["tokenizer"].ids)
    for run, prompt in ((found.patched, "a blue blue circle"), (found.branches[0].record, "circle")):
        (edit,) = run.spec.interventions
        assert edit.tokens(length) == tuple(columns(prompt))


def test_words_of_references_and_pairs_are_their_own(model):
    site, prompts = f"{LAYER}.to_v", ("a blue blue circle", "circle")
    runs = [model.record(prompt, seed=0, num_inference_steps=3, capture=[site]) for prompt in prompts]
    at = [tuple(model.words(prompt)["tokenizer"].of("circle")) for prompt in prompts]
    here = tuple(model.words("a blue circle")["tokenizer"].of("circle"))
    target = experiment().run(model).target
    told = {"site": site, "words": ("circle",)}
    by_hand = wb.Ablate(site, tokens=here, how="mean", references=runs, reference_tokens=at)
    mean = experiment(AblateSpec(**told, how="mean", references=prompts)).run(model).patched
    assert as_bytes(mean.latents) == as_bytes(target.fork(0, interventions=[by_hand]).latents)
    steer = experiment(SteerSpec(**told, pairs=(prompts,))).run(model).patched.spec.interventions[0]
    one, other = (
        torch.stack([run.at(site, step=step)[:, list(place)].mean(0) for step in range(3)]).mean(0)
        for run, place in zip(runs, at, strict=True)
    )
    assert torch.allclose(steer.direction, one - other, atol=1e-6)


@pytest.mark.parametrize(
    "second",
    [
        AblateSpec(site=MIDDLE, steps=(2,)),
        AblateSpec(site=MIDDLE, branch="uncond"),
        AblateSpec(site=MIDDLE, strength=0.5),
        AblateSpec(site=MIDDLE, mask=((1.0,),)),
        ScaleSpec(site=MIDDLE, factor=2.0),
        PatchSpec(site=MIDDLE, steps=(-1,)),
    ],
)
def test_two_that_both_leave_something_are_in_order(second):
    experiment(PatchSpec(site=MIDDLE, steps=(0, 1), branch="cond"), second)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kind": "pach", "site": MIDDLE}, "interventions.0: .*pach"),
        ({"kind": "patch", "site": "a site"}, "not a site"),
        ({"kind": "patch", "site": "unet:outputt"}, "No port 'outputt'"),
        ({"kind": "patch", "site": MIDDLE, "strenght": 1}, "strenght"),
        ({"kind": "scale", "site": MIDDLE, "factor": float("nan")}, "finite"),
        ({"kind": "scale", "site": MIDDLE}, "factor"),
        ({"kind": "ablate", "site": MIDDLE, "how": "mean"}, "references"),
        ({"kind": "ablate", "site": MIDDLE, "mask": [[1, 0], [1]]}, "equally long"),
        ({"kind": "ablate", "site": MIDDLE, "mask": [[2]]}, "less than or equal to 1"),
        ({"kind": "ablate", "site": MIDDLE, "steps": []}, "at least 1"),
        ({"kind": "ablate", "site": MIDDLE, "tokens": [1], "words": ["a"]}, "leave one of them out"),
        ({"kind": "module", "site": MIDDLE, "module": "os.system(1)"}, "pattern"),
        ({"kind": "module", "site": MIDDLE, "module": "torch:tanh", "to": 1}, "a feature"),
        ({"kind": "turn", "step": 1}, "a turn changes something"),
        ({"kind": "turn", "step": -1, "prompt": "a"}, "greater than or equal to 0"),
        ({"kind": "inject", "site": "*"}, "pattern"),
    ],
)
def test_what_a_file_says_wrong_is_named(tmp_path, wrong, says):
    given = {"source": "a", "target": "b", "interventions": [wrong]}
    (tmp_path / "experiment.json").write_text(json.dumps(given))
    with pytest.raises(InputError, match=says) as caught:
        Experiment.load(tmp_path / "experiment.json")
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_named_before_anything_is_changed(model):
    missing = ModuleSpec(site=MIDDLE, module="tests.experiments.test_changes:Nobody")
    with pytest.raises(InputError, match="cannot be imported"):
        experiment(missing).run(model, allow_code=True)


def test_code_is_imported_only_when_that_is_allowed(model, tmp_path, monkeypatch):
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w').close()\ndef run(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    hostile = experiment(ModuleSpec(site=MIDDLE, module="payload:run", arguments={}))
    with pytest.raises(InputError, match=r"'payload:run'.*allow_code=True"):
        hostile.run(model)
    assert not (tmp_path / "mark").exists()


def test_a_fork_keeps_what_was_done_to_the_latents():
    model = DiffusionModel(tiny.sd1())
    halved = Scale("latents", steps=0, factor=0.5)
    run = model.record("a red circle", seed=1, num_inference_steps=4, interventions=[halved])
    plain = model.record("a red circle", seed=1, num_inference_steps=4)
    assert not torch.equal(run.latents, plain.latents)
    assert torch.equal(run.fork(2).latents, run.latents)
    late = run.fork(2, interventions=[])
    assert torch.equal(late.latents, run.latents)
    assert late.images[0].tobytes() == run.images[0].tobytes()
