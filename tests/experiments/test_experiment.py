"""Experiments as data: JSON there and back, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from tests import tiny
from tests.watching import as_bytes
from workbench.errors import InputError, WorkbenchError
from workbench.experiments.experiment import Experiment, defaults
from workbench.experiments.site_changes import PatchSpec
from workbench.experiments.spec import FORMAT
from workbench.interventions.patch import Patch
from workbench.models.loop import trace_loop
from workbench.models.model import DiffusionModel

PATCHED = Experiment(
    model="some/model",
    source="a red circle",
    target='a "blue"\n{circle} \\ 円',
    seed=7,
    num_inference_steps=4,
    guidance_scale=2.5,
    arguments={"height": 16, "width": 16, "negative_prompt": None},
    interventions=(
        PatchSpec(site="unet.mid_block", steps=(0, 2), branch="cond"),
        PatchSpec(site="unet.down_blocks.0:output[0]"),
    ),
)


def test_file_gives_back_the_experiment(tmp_path):
    written = PATCHED.save(tmp_path / "experiment.json")
    assert Experiment.load(written) == PATCHED
    assert json.loads(written.read_text(encoding="utf-8"))["format"] == FORMAT


def test_a_file_of_the_first_format_is_read_and_one_of_a_later_is_not(tmp_path):
    first = json.loads(PATCHED.model_dump_json())
    first |= {"format": 1, "patches": first.pop("interventions")}
    for added in ("forks", "revision", "weights", "source_model"):
        del first[added]
    (tmp_path / "first.json").write_text(json.dumps(first))
    assert Experiment.load(tmp_path / "first.json") == PATCHED
    (tmp_path / "later.json").write_text(json.dumps({"format": 99, "unheard": "of"}))
    with pytest.raises(InputError, match="format 99, which a later version"):
        Experiment.load(tmp_path / "later.json")


@pytest.mark.parametrize(
    "change",
    [
        {"sauce": 1},
        {"format": FORMAT + 1},
        {"num_inference_steps": 0},
        {"source_from": -1},
        {"source_from": 4},
        {"guidance_scale": "high"},
        {"source": None},
        {"interventions": [{"kind": "patch", "site": "unet.mid_block", "stpes": [1]}]},
        {"interventions": [{"kind": "abblate", "site": "unet.mid_block"}]},
        {"interventions": [{"site": "unet.mid_block", "steps": []}]},
        {"interventions": [{"site": "os.system('true')"}]},
        {"interventions": [{"site": "unet.mid_block:nowhere"}]},
    ],
)
def test_file_that_holds_something_else_is_refused(tmp_path, change):
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps({**json.loads(PATCHED.model_dump_json()), **change}))
    with pytest.raises(InputError, match="is no experiment"):
        Experiment.load(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"source": "a"}'])
def test_malformed_file_is_refused(tmp_path, content):
    path = tmp_path / "experiment.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"experiment\.json is no experiment"):
        Experiment.load(path)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no experiment"):
        Experiment.load(tmp_path / "nowhere.json")


def test_settings_leave_out_what_is_the_pipelines_own():
    assert Experiment(source="a", target="b").settings() == {}
    assert PATCHED.settings() == {"num_inference_steps": 4, "guidance_scale": 2.5, **PATCHED.arguments}


def test_sites_are_captured_once():
    twice = PATCHED.model_copy(update={"interventions": (PATCHED.interventions[0], PATCHED.interventions[0])})
    assert twice.captures() == ("unet.mid_block",)


@pytest.mark.parametrize(
    ("chosen", "first"), [([(3, 2)], 2), ([None], 0), ([(-1,)], 3), ([(3,), (-3, -1)], 1)]
)
def test_first_patched_step(chosen, first):
    patches = tuple(PatchSpec(site="unet.mid_block", steps=steps) for steps in chosen)
    assert PATCHED.model_copy(update={"interventions": patches}).first_step(4) == first


def test_run_is_the_three_runs_by_hand():
    model = DiffusionModel(tiny.sd1())
    site = "unet.mid_block"
    experiment = Experiment(
        source="a red circle",
        target="a blue square",
        seed=2,
        num_inference_steps=3,
        interventions=(PatchSpec(site=site, steps=(1, 2), branch="cond"),),
    )
    outcome = experiment.run(model)
    settings = {"seed": 2, "num_inference_steps": 3}
    source = model.record("a red circle", capture=[site], **settings)
    patch = Patch(site, source=source, steps=(1, 2), branch="cond")
    patched = model.record("a blue square", interventions=[patch], **settings)
    assert as_bytes(outcome.source.images) == as_bytes(source.images)
    assert as_bytes(outcome.patched.images) == as_bytes(patched.images)
    assert as_bytes(outcome.patched.images) != as_bytes(outcome.target.images)
    assert outcome.patched.spec.forked_at == 1
    plain = experiment.model_copy(update={"interventions": ()}).run(model)
    assert plain.patched is None
    assert as_bytes(plain.target.images) == as_bytes(outcome.target.images)


SITE = "unet.mid_block"
LEAVING = Experiment(
    source="a red circle",
    target="a blue square",
    seed=2,
    num_inference_steps=4,
    source_from=2,
    interventions=(PatchSpec(site=SITE, branch="cond"),),
)


def test_source_that_leaves_the_targets_run_is_a_fork_of_it():
    model = DiffusionModel(tiny.sd1())
    outcome = LEAVING.run(model)
    target = model.record("a blue square", seed=2, num_inference_steps=4)
    source = target.fork(2, prompt="a red circle", capture=[SITE])
    patched = target.fork(2, interventions=[Patch(SITE, source=source, steps=(2, 3), branch="cond")])
    assert as_bytes(outcome.source.images) == as_bytes(source.images)
    assert as_bytes(outcome.patched.images) == as_bytes(patched.images)
    assert as_bytes(outcome.source.images) not in (as_bytes(target.images), as_bytes(patched.images))
    assert as_bytes(outcome.patched.images) != as_bytes(target.images)
    assert outcome.patched.spec.forked_at == 2


def test_patch_before_the_source_leaves_changes_nothing():
    model = DiffusionModel(tiny.sd1())
    early = LEAVING.model_copy(update={"interventions": (PatchSpec(site=SITE, steps=(0, 1)),)})
    outcome = early.run(model)
    assert early.acting(4) == []
    assert as_bytes(outcome.patched.images) == as_bytes(outcome.target.images)


@pytest.mark.parametrize(
    ("steps", "acting"), [(None, (2, 3)), ((1, 2), (2,)), ((-1,), (-1,)), ((-4, 3), (3,)), ((0,), None)]
)
def test_a_patch_acts_from_where_the_source_leaves(steps, acting):
    patched = LEAVING.model_copy(update={"interventions": (PatchSpec(site=SITE, steps=steps),)})
    assert [patch.steps for patch in patched.acting(4)] == ([] if acting is None else [acting])
    assert patched.model_copy(update={"source_from": 0}).acting(4) == list(patched.interventions)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"interventions": (PatchSpec(site=SITE, steps=(5, 2)),)}, "5 is none of them"),
        ({"num_inference_steps": None, "source_from": 50}, "50 steps, counted from 0"),
    ],
)
def test_steps_that_the_runs_do_not_have_are_refused_also_where_the_source_leaves(change, says):
    model = DiffusionModel(tiny.sd1())
    with pytest.raises(InputError, match=says):
        LEAVING.model_copy(update=change).run(model)


def test_step_the_run_does_not_have_is_refused():
    model = DiffusionModel(tiny.sd1())
    patches = (PatchSpec(site="unet.mid_block", steps=(5,)),)
    experiment = Experiment(source="a", target="a red", num_inference_steps=2, interventions=patches)
    with pytest.raises(WorkbenchError, match="5 is none of them"):
        experiment.run(model)


def test_defaults_are_the_pipelines_own():
    assert defaults(DiffusionModel(tiny.sd1())) == {"num_inference_steps": 50, "guidance_scale": 7.5}
    assert defaults(DiffusionModel(tiny.ddpm())) == {"num_inference_steps": 1000}


def test_a_pinned_experiment_brings_the_scheduler_that_the_model_had(tmp_path):
    """From its file, on the model as it was saved, it makes the same bytes; then the model is as before."""
    experiment = Experiment(
        model="shapes-unet",
        source="a red circle",
        target="a blue circle",
        num_inference_steps=2,
        interventions=(PatchSpec(site="unet.mid_block", branch="cond"),),
    )
    model = DiffusionModel("shapes-unet")
    assert experiment.sampled(model).scheduler is None
    own = model.pipeline.scheduler
    model.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(own.config, use_karras_sigmas=True)
    wanted = experiment.run(model).patched
    pinned = experiment.pinned(model)
    assert pinned.scheduler.config["lambda_min_clipped"] == {"number": "-inf"}
    model.pipeline.scheduler = own
    loaded = Experiment.load(pinned.save(tmp_path / "experiment.json"))
    found = loaded.run(model).patched
    assert as_bytes(found.latents) == as_bytes(wanted.latents) == as_bytes(loaded.run().patched.latents)
    assert as_bytes(experiment.run(model).patched.latents) != as_bytes(wanted.latents)
    assert model.pipeline.scheduler is own
    with pytest.raises(InputError, match=r"DPMSolverMultistepScheduler.*put that back"):
        found.fork(1)
    assert as_bytes(loaded.patch(*_both(loaded, model)).latents) == as_bytes(wanted.latents)


def _both(experiment, model):
    target = experiment.run_target(model)
    return experiment.run_source(model, target, capture=experiment.captures()), target


@pytest.mark.parametrize(
    ("scheduler", "says"),
    [
        ({"name": "NoScheduler"}, "no scheduler of diffusers"),
        ({"name": "DiffusionPipeline"}, "no scheduler of diffusers"),
        ({"name": "DDIMScheduler", "config": {"beta_schedule": "nil"}}, "does not take the .* configuration"),
    ],
)
def test_a_scheduler_that_is_none_is_refused_before_the_run(scheduler, says):
    experiment = Experiment(source="a", target="b", num_inference_steps=1, scheduler=scheduler)
    model = DiffusionModel(tiny.sd1())
    for act in (experiment.run, experiment.check):
        with pytest.raises(InputError, match=says):
            act(model)


def test_a_model_without_a_scheduler_of_its_own_takes_none():
    experiment = Experiment(num_inference_steps=1, scheduler={"name": "DDIMScheduler"})
    parts = {name: tiny.sd1().components[name] for name in ("unet", "scheduler")}
    loop = trace_loop(lambda **_: None, components=parts)
    with pytest.raises(InputError, match="none to exchange"):
        experiment.run(loop)


def test_the_model_of_the_source_is_as_the_models_own_and_of_the_weights_that_are_said(tmp_path):
    model = DiffusionModel(tiny.sd1().to(torch.float64))
    model.save_pretrained(tmp_path / "other")
    experiment = Experiment(
        source="a", target="b", num_inference_steps=1, source_model=str(tmp_path / "other")
    )
    assert experiment.open_source(model).unet.dtype == torch.float64
    pinned = experiment.pinned(model)
    assert pinned.source_weights == pinned.weights
    assert pinned.run(model).source.model.unet.dtype == torch.float64
    changed = pinned.model_copy(update={"source_weights": "sha256:" + "0" * 64})
    with pytest.raises(InputError, match=r"0000.*source_weights"):
        changed.run(model)
    with pytest.raises(ValueError, match="there is none"):
        Experiment(source_weights=pinned.weights)
