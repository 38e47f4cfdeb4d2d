"""A sweep's cells, what is measured of them, and its controls."""

import numpy as np
import pytest
import torch

from tests import tiny
from tests.watching import as_bytes, forwards_of
from workbench.errors import InputError, RunStopped, StoreError, UnknownNameError
from workbench.experiments.experiment import Experiment
from workbench.experiments.measure import metric
from workbench.experiments.measured import METRICS, RunMetric
from workbench.experiments.metrics import towards
from workbench.experiments.site_changes import PatchSpec
from workbench.experiments.sweep import SEEDS, Sweep
from workbench.interventions.control import RandomDirection
from workbench.interventions.corrupt import Corrupt
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel

MIDDLE, LATER = "unet.mid_block", "unet.up_blocks.0"
HEADS = "unet.mid_block.attentions.0.transformer_blocks.0.attn2:heads"
PAIR = Experiment(source="a {colour} circle", target="a blue square", num_inference_steps=3)
AXES = {"site": [MIDDLE, LATER], "step": range(3), "colour": ["red", "green"], "seed": [0, 5]}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def whole(model):
    return Sweep(PAIR, AXES).run(model)


def small(**asked):
    pair = PAIR.model_copy(update={"source": "a red circle", "num_inference_steps": 2})
    axes = {"site": [MIDDLE, LATER], "step": range(2), "seed": [0]} | asked.pop("axes", {})
    return Sweep(pair, axes, **{"metrics": ["towards_latents"], "controls": False} | asked)


def holding(*changes):
    """Return what makes the cell of a seed, with changes."""

    def cell(point):
        told = {"source": "a red circle", "num_inference_steps": 2, "seed": point["seed"]}
        return Experiment(**{**PAIR.model_dump(), **told, "interventions": changes})

    return cell


def test_every_cell_is_measured_under_its_labels(model, whole):
    assert whole.towards.dims == ("site", "step", "colour", "seed")
    assert np.isfinite(whole.towards).all()
    labels = {"site": LATER, "step": 1, "colour": "green", "seed": 5}
    runs = {"seed": 5, "num_inference_steps": 3}
    source = model.record("a green circle", capture=[LATER], **runs)
    target = model.record("a blue square", **runs)
    patch = Patch(LATER, source=source, steps=1, branch="cond")
    patched = model.record("a blue square", interventions=[patch], **runs)
    alone = Sweep(PAIR, AXES).run_at(model, **labels)
    assert as_bytes(alone.latents) == as_bytes(patched.latents)
    assert as_bytes(alone.images[0]) == as_bytes(patched.images[0])
    value = towards(patched.images[0], target.images[0], source.images[0])
    assert float(whole.towards.sel(labels)) == pytest.approx(value, abs=1e-3)


def test_rows_of_one_run_measure_what_runs_of_their_own_do(model):
    together, alone = (small(rows=rows).run(model).towards_latents for rows in (8, 1))
    assert np.abs(together - alone).max() <= 1e-5 * np.abs(alone).max()
    assert np.abs(alone).min() > 1e-3


def test_controls_stand_beside_the_cells(whole):
    assert whole.towards_random.dims == whole.towards.dims
    assert (np.abs(whole.towards_random - whole.towards) > 0).all()
    for kind in ("identity", "floor"):
        assert whole[f"towards_{kind}"].dims == ("colour", "seed")
    assert (whole.towards_identity == 0).all()
    assert (whole.difference_identity == 0).all()
    assert (whole.difference_floor > 0).all()


def test_mean_and_interval_are_over_the_seeds(whole):
    assert whole.towards_mean.dims == ("site", "step", "colour")
    assert np.allclose(whole.towards_mean, whole.towards.mean("seed"))
    assert (whole.towards_low <= whole.towards_mean).all()
    assert (whole.towards_mean <= whole.towards_high).all()
    assert "Student" in whole.attrs["interval"]


def test_words_are_an_axis(model):
    site = f"{MIDDLE}.attentions.0.transformer_blocks.0.attn2.to_v"
    words = ["circle -> square", "red -> blue", ("red -> blue", "circle -> square")]
    axes = {"site": [site], "step": np.arange(1), "words": words, "seed": np.array([0])}
    found = small(axes=axes, metrics=["difference_latents"]).run(model).difference_latents
    assert found.words.values.tolist() == [*words[:2], "red -> blue + circle -> square"]
    assert found.seed.dtype.kind == "i"
    assert len(set(found.values.flatten())) == 3
    labels = {"site": site, "step": 0, "seed": 0}
    alone = small(axes=axes).run_at(model, words="red -> blue", **labels)
    source = model.record("a red circle", seed=0, num_inference_steps=2, capture=[site])
    pairs = (("a red circle", "red"), ("a blue square", "blue"))
    red, blue = (model.words(prompt)["tokenizer"].of(word) for prompt, word in pairs)
    patch = Patch(site, source=source, steps=[0], branch="cond", tokens=blue, from_tokens=red)
    by_hand = model.record("a blue square", seed=0, num_inference_steps=2, interventions=[patch])
    assert as_bytes(alone.latents) == as_bytes(by_hand.latents)


def test_what_is_measured_and_what_corrupts_are_of_a_sweeps_identity():
    def told(**asked):
        return small(**asked).key

    red, blue = (metric("colour", wanted=wanted) for wanted in ("red", "blue"))
    to = [metric("ssim", to=which) for which in ("source", "target")]
    masks = [Corrupt(mask=torch.tensor([[share, 1.0]])) for share in (0.0, 0.5)]
    keys = [told(metrics=[each]) for each in (red, blue, *to, "pixel")]
    keys += [told(corrupt=[each]) for each in masks]
    assert len(set(keys)) == len(keys)
    assert told(metrics=[metric("colour", wanted="red")]) == keys[0]
    with pytest.raises(InputError, match="none of the 2 steps"):
        small(corrupt=[Corrupt(steps=slice(30, None))])


def test_a_cell_may_hold_a_module_of_ones_own_where_that_is_allowed(model):
    own = {"kind": "module", "site": MIDDLE, "module": "torch:tanh"}
    mean = {"kind": "ablate", "site": LATER, "how": "mean", "references": ["a green circle"]}
    sweep = small(cell=holding(own, mean), axes={"site": [MIDDLE], "step": [0], "seed": [0, 1]})
    with pytest.raises(InputError, match="allow_code=True"):
        sweep.run(model)
    found = sweep.run(model, allow_code=True)
    assert "error" not in found
    assert np.isfinite(found.towards_latents).all()
    alone = sweep.run_at(model, seed=1, allow_code=True)
    outcome = sweep.at(seed=1).run(model, allow_code=True)
    assert as_bytes(alone.latents) == as_bytes(outcome.patched.latents)


def test_pictures_that_are_equal_have_an_infinite_ratio_also_on_disk(model, tmp_path):
    same = {"kind": "scale", "site": MIDDLE, "factor": 1.0}
    sweep = small(cell=holding(same), metrics=["psnr"], axes={"site": [MIDDLE], "step": [0], "seed": [0, 1]})
    for _ in range(2):
        found = sweep.run(model, tmp_path / "kept")
        assert np.isposinf(found.psnr).all()
        assert "error" not in found


def test_the_axes_of_an_experiments_own_patches_change_them():
    own = PatchSpec(site=MIDDLE, branch="uncond", steps=(1,))
    scaled = {"kind": "scale", "site": LATER, "factor": 0.5}
    pair = PAIR.model_validate(
        {**PAIR.model_dump(), "source": "a red circle", "interventions": [own, scaled]}
    )
    axes = {"step": [0, -1], "branch": ["cond", "all"], "heads": [1], "words": ["red -> blue"], "seed": [4]}
    sweep = Sweep(pair, axes)
    assert sweep.axes["step"] == (0, 2)
    chosen = {"heads": (1,), "words": ("blue",), "from_words": ("red",)}
    expected = PatchSpec(site=MIDDLE, steps=(2,), branch="all", **chosen)
    for step in (2, -1):
        cell = sweep.at(step=step, branch="all")
        assert cell.interventions == (expected, pair.interventions[1])
    assert len({each.model_dump_json() for each in sweep.cells}) == len(sweep.cells) == 4
    alone = Experiment(source="a", target="b", num_inference_steps=3, interventions=[scaled])
    assert [each.interventions[0].steps for each in Sweep(alone, {"step": [0, 2], "seed": [0]}).cells] == [
        (0,),
        (2,),
    ]


def test_a_swept_patch_stands_beside_the_experiments_own(model):
    own = PatchSpec(site=MIDDLE, branch="cond")
    pair = PAIR.model_copy(
        update={"source": "a red circle", "num_inference_steps": 2, "interventions": (own,)}
    )
    axes = {"site": [LATER], "step": [1], "seed": [0]}
    sweep = Sweep(pair, axes, metrics=["difference_latents"])
    patch = PatchSpec(site=LATER, branch="cond", steps=(1,))
    assert sweep.cells[0].interventions == (own, patch)
    runs = {"seed": 0, "num_inference_steps": 2}
    source = model.record("a red circle", capture=[MIDDLE, LATER], **runs)
    kept, swept = own.bind(pair.runs(source, source)), patch.bind(pair.runs(source, source))
    changes = [kept, RandomDirection.of(swept, seed=0)]
    random = model.record("a blue square", interventions=changes, **runs)
    target = model.record("a blue square", **runs)
    found = sweep.run(model)
    expected = METRICS["difference_latents"].of(random, source, target)
    assert found.difference_latents_random.item() == pytest.approx(expected, rel=1e-4)
    assert found.difference_latents_identity == 0
    with pytest.raises(InputError, match=r"puts something new.*experiment\.plain"):
        Sweep(pair, {"site": [MIDDLE], "step": [1]})


def test_controls_of_words_and_of_other_sites(model):
    site = f"{MIDDLE}.attentions.0.transformer_blocks.0.attn2.to_v"
    words = ["red -> blue", "circle -> square", "red -> nowhere"]
    found = small(axes={"site": [site], "step": [0], "words": words}, controls=True).run(model)
    assert found.towards_latents_identity == 0
    assert np.isfinite(found.towards_latents_random.sel(words=words[:2])).all()
    assert "nowhere" in found.error_random.sel(words="red -> nowhere").item()
    assert "error_identity" not in found
    patch = {"kind": "patch", "site": MIDDLE, "from_step": 0, "branch": "cond"}
    axes = {"site": [MIDDLE], "step": [0], "seed": [0]}
    assert small(cell=holding(patch), axes=axes, controls=True).run(model).towards_latents_identity == 0


def test_a_random_control_keeps_what_else_a_cell_changes(model):
    patch = {"kind": "patch", "site": MIDDLE, "branch": "cond"}
    same = {"kind": "patch", "site": LATER, "branch": "cond", "strength": 0.0}
    scaled = {"kind": "scale", "site": "unet.conv_in", "factor": 0.0}
    axes = {"site": [MIDDLE], "step": [0], "seed": [0]}
    asked = {"axes": axes, "controls": True, "metrics": ["difference_latents"], "rows": 1}
    scale = small(cell=holding(scaled), **asked).run(model)
    assert not [name for name in scale if name.endswith(("_random", "_identity"))]
    assert scale.difference_latents_floor > 0
    both = small(cell=holding(scaled, same), **asked).run(model)
    assert both.difference_latents_random.item() == pytest.approx(scale.difference_latents.item())
    assert both.difference_latents_identity == 0
    assert small(cell=holding(patch), **asked).run(model).difference_latents_random > 0


def test_a_metric_that_raises_fails_its_cell_and_no_more(model, tmp_path):
    def picky(run, source, target):
        if len(run.spec.interventions) == 1 and not isinstance(run.spec.interventions[0], Patch):
            raise KeyError("patch")
        return 1.0

    asked = {"metrics": [RunMetric("picky", picky, pictures=False), "towards_latents"], "rows": 1}
    for _ in range(2):
        found = small(controls=True, **asked).run(model, tmp_path)
        assert (found.picky == 1).all()
        assert np.isnan(found.picky_random).all()
        assert np.isfinite(found.towards_latents_random).all()
        assert found.error_random.values.ravel().tolist() == ["picky ended with KeyError: 'patch'"] * 4
        assert "error" not in found


def test_what_failed_is_run_again_where_that_is_asked_for(model, tmp_path):
    missing, measured = ["weights"], []

    def learned(run, source, target):
        measured.append(run)
        if missing and len(measured) == 2:
            raise OSError("the weights are not there")
        return 1.0

    sweep = small(metrics=[RunMetric("learned", learned, pictures=False)], rows=1, controls=False)
    assert (sweep.run(model, tmp_path).error.values != "").sum() == 1
    missing.clear()
    measured.clear()
    assert (sweep.run(model, tmp_path).error.values != "").sum() == 1
    assert not measured
    found = sweep.run(model, tmp_path, retry=True)
    assert "error" not in found
    assert (found.learned == 1).all()
    assert len(measured) == 1
    assert "error" not in sweep.load(tmp_path)


def test_metrics_of_one_name_are_told_apart_by_another(model):
    red, blue = (metric("colour", wanted=wanted) for wanted in ("red", "blue"))
    with pytest.raises(InputError, match=r"wb\.RunMetric"):
        small(metrics=[red, blue])
    wide = metric(lambda image: image.width)
    named = [RunMetric("red", red), RunMetric("wide", wide)]
    assert named[0].code == "wb.RunMetric('red', wb.metric('colour', wanted='red'))"
    assert named[1].code is None
    sweep = small(metrics=[RunMetric("ratio", metric("psnr")), named[1]])
    found = sweep.run(model)
    assert (found.wide == 16).all()
    assert np.isfinite(found.ratio).all()


def test_several_seeds_are_the_default():
    sweep = Sweep(PAIR.model_copy(update={"seed": 7}), {"site": [MIDDLE], "colour": ["red"]})
    assert sweep.axes["seed"] == tuple(range(7, 7 + SEEDS))
    assert [each.seed for each in sweep.cells] == list(range(7, 7 + SEEDS))
    assert len({each.model_dump_json() for each in sweep.cells}) == SEEDS


def test_a_cell_is_the_patch_of_its_point():
    sweep = Sweep(PAIR, {**AXES, "site": [(MIDDLE, LATER)], "window": ["1", "from here"]}, branch="all")
    cell = sweep.at(step=1, colour="red", seed=5, window="from here")
    assert (cell.source, cell.target, cell.seed) == ("a red circle", "a blue square", 5)
    both = [PatchSpec(site=site, steps=(1, 2), branch="all") for site in (MIDDLE, LATER)]
    assert cell.interventions == tuple(both)


def test_each_pair_is_run_once_and_only_tails_are_computed(model):
    sweep = small(rows=4)
    with forwards_of(model.pipeline.unet) as calls:
        sweep.run(model)
    source, captured, target, tried = 2, 2, 2, 2
    assert [rows for rows in calls if rows == 2] == [2] * (source + captured + target)
    # The two layers of each step are two rows, and guidance doubles them: two steps from 0, one from 1.
    assert len([rows for rows in calls if rows == 4]) == tried + 3


def test_heads_are_an_axis(model):
    pair = PAIR.model_copy(update={"source": "a red circle", "num_inference_steps": 2})
    sweep = Sweep(pair, {"site": [HEADS], "heads": [0, (0, 1), 9], "seed": [0]}, metrics=["towards_latents"])
    found = sweep.run(model)
    runs = {"seed": 0, "num_inference_steps": 2}
    source = model.record("a red circle", capture=[HEADS], **runs)
    patch = Patch(HEADS, source=source, branch="cond", heads=[0, 1])
    patched = model.record("a blue square", interventions=[patch], **runs)
    assert as_bytes(sweep.run_at(model, heads=(0, 1)).latents) == as_bytes(patched.latents)
    assert found.heads.values.tolist() == ["0", "0 + 1", "9"]
    # The head that the layer has not is told, and the others are measured.
    assert np.isfinite(found.towards_latents).values.ravel().tolist() == [True, True, False]
    assert "9 is none of them" in str(found.error.sel(heads="9").item())
    assert found.towards_latents_identity == 0


def test_any_experiment_can_be_a_cell(model):
    def guided(point):
        return PAIR.model_copy(
            update={
                "source": "a red circle",
                "num_inference_steps": 2,
                "seed": point["seed"],
                "guidance_scale": point["guidance"],
                "interventions": (PatchSpec(site=MIDDLE),),
            }
        )

    pair = PAIR.model_copy(update={"num_inference_steps": 2})
    axes = {"guidance": [2.0, 5.0], "seed": [0]}
    found = Sweep(pair, axes, cell=guided, metrics=["towards_latents"]).run(model)
    assert found.towards_latents.dims == ("guidance", "seed")
    assert found.towards_latents_floor.dims == ("guidance",)
    assert np.isfinite(found.towards_latents).all()


def test_a_metric_is_any_function_and_what_is_no_number_is_told(model):
    def wide(run, source, target):
        return float("nan") if run.images[0] == target.images[0] else run.images[0].width

    found = small(metrics=[wide, RunMetric("one", lambda *_: 1, pictures=False)], controls=True).run(model)
    assert (found.wide == 16).all()
    assert (found.one == 1).all()
    assert np.isnan(found.wide_identity)


def test_without_pictures_none_are_decoded_but_of_the_two_runs(model):
    with forwards_of(model.pipeline.vae.decoder) as decoded:
        small().run(model)
    assert len(decoded) <= 3
    with forwards_of(model.pipeline.vae.decoder) as decoded:
        small(metrics=["towards"]).run(model)
    assert sum(decoded) >= 4


def test_restoring_the_prompt_undoes_its_corruption_and_a_layer_a_part_of_it(model):
    """The causal trace: one prompt, corrupted in the target's run, and one place restored from the clean."""
    text = "unet:inputs[1].encoder_hidden_states"
    pair = Experiment(source="a red circle", target="a red circle", num_inference_steps=2)
    sweep = Sweep(
        pair,
        {"site": [text, MIDDLE], "seed": [0]},
        corrupt=[Corrupt()],
        metrics=["towards_latents", "difference_latents"],
        rows=1,
    )
    found = sweep.run(model)
    assert found.towards_latents.sel(site=text).item() == pytest.approx(1, abs=1e-9)
    assert found.towards_latents.sel(site=MIDDLE).item() != 0
    assert found.difference_latents.sel(site=text).item() > 1e-3
    assert (found.towards_latents_identity == 0).all()
    together = Sweep(pair, sweep.axes, corrupt=[Corrupt()], metrics=["towards_latents"]).run(model)
    assert np.allclose(together.towards_latents, found.towards_latents, atol=1e-5)


def test_what_was_measured_is_not_measured_again(model, tmp_path):
    sweep, told = small(rows=2), []

    def stop(progress):
        told.append(progress.done)
        if progress.done == 2:
            raise RunStopped("enough")

    with pytest.raises(RunStopped):
        sweep.run(model, tmp_path, progress=stop)
    assert told == [0, 2]
    partly = sweep.load(tmp_path)
    assert np.isfinite(partly.towards_latents).sum() == 2
    told.clear()
    found = sweep.run(model, tmp_path, progress=lambda progress: told.append(progress.done))
    assert told == [2, 4]
    assert found.identical(small(rows=2).run(model))
    with forwards_of(model.pipeline.unet) as calls:
        assert sweep.run(model, tmp_path).identical(found)
    assert calls == []


def test_a_folder_of_another_sweep_is_refused_and_the_difference_named(model, tmp_path):
    small().run(model, tmp_path / "sweep")
    with pytest.raises(StoreError, match="differs in axes, cells"):
        small(axes={"seed": [1]}).run(model, tmp_path / "sweep")
    with pytest.raises(StoreError, match="differs in metrics"):
        small(metrics=["towards"]).load(tmp_path / "sweep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"holds no sweep.*thesis\.tex"):
        small().run(model, tmp_path / "other")


def test_another_models_runs_are_not_mixed_in(model, tmp_path):
    sweep = small(rows=2)
    sweep.run(model, tmp_path)
    (tmp_path / "batch-000001.json").unlink()
    other = tiny.sd1()
    other.unet.conv_out.weight.data *= 1.5
    with pytest.raises(StoreError, match="its weights"):
        sweep.run(DiffusionModel(other), tmp_path)
    assert np.isfinite(sweep.run(model, tmp_path).towards_latents).all()


def test_a_site_that_the_model_has_not_is_told_before_anything_runs(model, tmp_path):
    with forwards_of(model.pipeline.unet) as calls, pytest.raises(UnknownNameError, match="Did you mean"):
        small(axes={"site": [MIDDLE, "unet.midblock"]}).run(model, tmp_path)
    assert calls == []


def test_without_xarray_the_extra_is_named(monkeypatch, model):
    monkeypatch.setitem(__import__("sys").modules, "xarray", None)
    with pytest.raises(InputError, match=r"diffusion-workbench\[experiments\]"):
        small().run(model)


@pytest.mark.parametrize(
    ("axes", "asked", "error", "said"),
    [
        ({"site": []}, {}, InputError, "no values"),
        ({"site": MIDDLE}, {}, InputError, "takes a list"),
        ({"site": [MIDDLE, MIDDLE]}, {}, InputError, "twice"),
        ({"step": [2]}, {}, InputError, "2 is none"),
        ({"step": ["1"]}, {}, InputError, "'1' is none"),
        ({"step": [1, -1]}, {}, InputError, "twice"),
        ({"words": ["red -> green -> blue"]}, {}, InputError, "'red -> green -> blue'"),
        ({"words": ["-> blue"]}, {}, InputError, "'-> blue'"),
        ({"layer": [MIDDLE]}, {}, UnknownNameError, "No axis 'layer'"),
        ({}, {"window": "quater"}, UnknownNameError, "Did you mean 'quarter'"),
        ({}, {"metrics": ["toward"]}, UnknownNameError, "Did you mean 'towards'"),
        ({}, {"metrics": "towards"}, InputError, "no list of metrics"),
        ({}, {"rows": 0}, InputError, "rows=0"),
        ({}, {"metrics": [RunMetric("seed", lambda *_: 0.0)]}, InputError, "both called seed"),
        ({}, {"cell": lambda point: point}, InputError, "not an Experiment"),
    ],
)
def test_what_is_no_sweep_is_refused_before_anything_runs(axes, asked, error, said):
    with pytest.raises(error, match=said):
        small(axes=axes, **asked)


@pytest.mark.parametrize(
    ("change", "axes", "asked", "said"),
    [
        ({"kind": "patch"}, {"window": ["1", "half"]}, {}, "an axis 'step'"),
        ({"kind": "patch"}, {}, {"window": "half"}, "an axis 'step'"),
        ({"kind": "patch"}, {}, {"branch": "all"}, "an axis 'branch'"),
        ({"kind": "patch", "tokens": [0]}, {"words": ["red"]}, {}, "both choose places"),
        ({"kind": "scale", "factor": 2.0}, {"words": ["red -> blue"]}, {}, "scale takes nothing"),
        ({"kind": "reweight", "words": {"blue": 2.0}}, {"words": ["red"]}, {}, "reweight chooses none"),
    ],
)
def test_an_axis_that_would_change_no_cell_is_refused(change, axes, asked, said):
    pair = {"source": "a red circle", "target": "a blue square", "num_inference_steps": 3}
    experiment = Experiment(**pair, interventions=[{"site": MIDDLE, **change}])
    with pytest.raises(InputError, match=said):
        Sweep(experiment, axes, **asked)


def test_a_sweep_names_its_steps():
    with pytest.raises(InputError, match="num_inference_steps=20"):
        Sweep(Experiment(source="a", target="b"), {"site": [MIDDLE]})


def test_a_point_that_is_none_is_named():
    sweep = small()
    with pytest.raises(UnknownNameError, match="no axis 'layer'"):
        sweep.at(layer=3)
    with pytest.raises(InputError, match="counted from 0; 7 is none"):
        sweep.at(site=MIDDLE, step=7)
    with pytest.raises(InputError, match="Say which site"):
        sweep.at(step=1)
