"""The app: linked views over two runs, what each message does, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from tests import tiny
from tests.watching import as_bytes, footprint
from workbench.errors import BusyError, InputError, RunStopped, UnknownNameError, WorkbenchError
from workbench.experiments.branching import Fork
from workbench.experiments.changes import ReweightSpec
from workbench.experiments.experiment import Experiment
from workbench.experiments.exporting import FORMATS
from workbench.experiments.site_changes import PatchSpec, ScaleSpec
from workbench.interventions.patch import Patch
from workbench.models.model import DiffusionModel
from workbench.widgets.app import Workbench

LONG = 120
FAMILIES = {
    "sd1": ({}, "unet.mid_block"),
    "sd3": ({"max_sequence_length": 24}, "transformer.transformer_blocks.0:output[1]"),
    "flux": (
        {"max_sequence_length": 24, "height": 16, "width": 16},
        "transformer.single_transformer_blocks.0:output[1]",
    ),
}
SITE = "unet.mid_block"


def front_end(widget, **content):
    """Send what the browser sends."""
    widget._handle_custom_msg(content, [])


def until(true):
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def picture(png):
    return Image.open(BytesIO(png))


@contextmanager
def opened(build=tiny.sd1, **asked):
    bench = Workbench(build(), **{"steps": 4, "seed": 1, **asked})
    try:
        yield bench
    finally:
        bench.close()


@contextmanager
def held(bench, call=1):
    """Hold the denoiser at its ``call``-th call from now until the block ends."""
    reached, go, calls = threading.Event(), threading.Event(), []

    def wait(*_):
        calls.append(1)
        if len(calls) == call:
            reached.set()
            assert go.wait(LONG)

    (denoiser,) = bench.model.denoisers.values()
    hook = denoiser.register_forward_pre_hook(wait)
    try:
        yield reached
    finally:
        go.set()
        hook.remove()


@pytest.fixture(scope="module")
def ready():
    """An app on SD1 whose pair has run, shared by tests that leave the pair as it is."""
    with opened() as bench:
        bench.run().result(LONG)
        until(lambda: bench.map.noise_floor is not None)
        yield bench


@pytest.fixture
def bench(ready):
    yield ready
    ready.stop()
    until(lambda: not ready._worker.busy and not ready.map.busy)
    ready.controls.set_state({"source": "a red circle", "target": "a blue circle", "steps": 4})
    ready.controls.error, ready.controls.status = {}, "done"
    ready.set_window("half")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_run_fills_the_views_and_patch_changes_the_image(name):
    arguments, site = FAMILIES[name]
    with opened(getattr(tiny, name), **arguments) as bench:
        pair = bench.run().result(LONG)
        assert bench.controls.status == "done"
        assert bench.controls.error == {}
        assert [lane["label"] for lane in bench.scrubber.lanes] == ["source", "target"]
        assert bench.scrubber.kinds[0] == "predicted x₀"
        assert all(len(frames) == 4 for lane in bench.scrubber.lanes for frames in lane["frames"].values())
        assert [row["step"] for row in bench.scrubber.rows] == [0, 1, 2, 3]
        assert len(bench.scrubber.curve) == 4
        words = [token["text"] for token in bench.scrubber.attention["tokens"]]
        assert {"blue", "circle"} <= set(words)
        assert site in bench.map.sites
        assert bench.map.steps == 4
        assert np.isnan(bench.map.array()).all()
        shown = {card["label"]: picture(card["png"]) for card in bench.images.cards}
        assert list(shown) == ["source", "target"]
        assert shown["target"].tobytes() == bench.target.images[0].tobytes()
        assert shown["source"].tobytes() != shown["target"].tobytes()
        compile(bench.code.code, "code", "exec")
        assert {node["path"]: node["shape"] for node in bench.tree.nodes}[site.partition(":")[0]]

        settings = {"seed": 1, **pair.experiment.settings()}
        plain = DiffusionModel(getattr(tiny, name)()).record("a blue circle", **settings)
        assert as_bytes(plain.images) == as_bytes(bench.target.images)

        cell = bench.patch(site, 1).result(LONG)
        row = bench.map.sites.index(site)
        assert bench.map.selected == [row, 1]
        assert bench.map.array()[row, 1] == np.float32(cell.towards)
        assert np.isfinite(bench.map.array()).sum() == 1
        assert [card["label"] for card in bench.images.cards] == ["source", "target", "patched", "Δ"]
        bench._screen.draw_images(pair, dataclasses.replace(cell, towards=-0.004))
        assert bench.images.note.startswith("towards source 0% · difference")
        assert as_bytes(bench.patched.images) != as_bytes(bench.target.images)
        assert [lane["label"] for lane in bench.scrubber.lanes] == ["source", "target", "patched"]
        assert f"{site!r}, source=source" in " ".join(bench.code.code.split())
        patch = Patch(site, source=bench.source, steps=range(1, 3), branch="cond")
        assert cell.experiment.interventions[0].steps == (1, 2)
        whole = bench.model.record("a blue circle", interventions=[patch], **settings)
        assert as_bytes(whole.images) == as_bytes(bench.patched.images)


def test_front_end_runs_patches_and_chooses_windows():
    with opened() as bench:
        bench.controls.set_state({"source": "a green cross", "steps": 3, "seed": 5})
        assert "'a green cross'" in bench.code.code
        front_end(bench.controls, kind="run")
        until(lambda: bench.map.noise_floor is not None)
        assert bench.experiment.source == "a green cross"
        assert bench.target.ledger.steps == 3
        front_end(bench.map, kind="window", value="from here")
        front_end(bench.map, kind="cell", row=bench.map.sites.index(SITE), column=1)
        until(lambda: bench.patched is not None and bench.controls.status == "done")
        assert bench.experiment.interventions[0].steps == (1, 2)


def test_source_leaves_the_targets_run_where_asked():
    with opened(source_from=2) as bench:
        bench.run().result(LONG)
        early, late = bench.source.latents == bench.target.latents, (2, 3)
        assert early[:2].all()
        assert not any(early[step].all() for step in late)
        assert "target.fork(2, prompt='a red circle')" in bench.code.code
        for site in (SITE, "unet.conv_in"):
            cell = bench.patch(site, 2, "from here").result(LONG)
            alone = cell.experiment.run(DiffusionModel(tiny.sd1()))
            assert as_bytes(alone.patched.images) == as_bytes(bench.patched.images)
            assert as_bytes(alone.patched.images) != as_bytes(bench.target.images)
        assert bench.patch(SITE, 1, "1").result(LONG).towards == 0.0
        assert as_bytes(bench.patched.images) == as_bytes(bench.target.images)
        bench.controls.set_state({"source_from": 4})
        with pytest.raises(InputError, match="never leave"):
            bench.run()


def test_second_run_is_refused_while_one_goes_on():
    with opened() as bench:
        with held(bench) as reached:
            first = bench.run()
            assert reached.wait(LONG)
            with pytest.raises(BusyError, match=r"bench\.stop\(\)"):
                bench.run()
            assert bench.controls.status == "running"
            front_end(bench.controls, kind="run")
            assert bench.controls.error["title"] == "BusyError"
            assert bench.controls.status == "running"
        first.result(LONG)
        assert bench.controls.status == "done"
        bench.run().result(LONG)


BAD = {
    "empty prompt": ({"source": "  "}, InputError, "prompt is empty"),
    "long prompt": ({"target": "circle " * 30}, InputError, "the model reads 24"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_prompt_that_cannot_be_run_is_refused_and_the_pair_stays(bench, name):
    state, error, text = BAD[name]
    source, cards = bench.source, bench.images.cards
    bench.controls.set_state(state)
    with pytest.raises(error, match=text):
        bench.run()
    front_end(bench.controls, kind="run")
    assert text in bench.controls.error["text"]
    assert bench.controls.status == "done"
    assert bench.source is source
    assert bench.images.cards == cards
    front_end(bench.controls, kind="dismiss")
    assert bench.controls.error == {}


def test_unknown_site_window_step_and_format_are_refused(bench, tmp_path):
    with pytest.raises(UnknownNameError, match=r"unet\.mid_block"):
        bench.patch("unet.mid_blok", 0)
    with pytest.raises(InputError, match="4 steps"):
        bench.patch(SITE, 9)
    with pytest.raises(UnknownNameError, match="Did you mean 'quarter'"):
        bench.patch(SITE, 0, window="quater")
    with pytest.raises(UnknownNameError, match="Did you mean 'standalone'"):
        bench.export("standalon", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert bench.controls.status == "done"
    assert bench.map.window == "half"


def test_before_a_run_there_is_nothing_to_patch_fill_or_export_alone(tmp_path):
    with opened() as bench:
        for act in (
            lambda: bench.patch(SITE, 0),
            bench.fill,
            lambda: bench.export("standalone", tmp_path / "x"),
        ):
            with pytest.raises(InputError, match=r"bench\.run\(\)"):
                act()
        front_end(bench.map, kind="fill")
        assert bench.controls.error["title"] == "InputError"
        assert bench.controls.status == "idle"
        assert (bench.source, bench.target, bench.patched) == (None, None, None)


def test_site_that_fails_says_so_and_the_pair_stays(bench):
    cards, sites = bench.images.cards, bench.map.sites
    with pytest.raises(WorkbenchError, match="outside the steps"):
        bench.patch("vae.decoder", 0).result(LONG)
    assert bench.controls.status == "error"
    assert bench.controls.error["title"] == "InputError"
    assert bench.images.cards == cards
    assert bench.map.sites == sites
    assert bench.patch(SITE, 0).result(LONG).difference > 0
    assert bench.controls.error == {}


def test_stop_in_the_middle_keeps_the_earlier_pair(bench):
    source, cards = bench.source, bench.images.cards
    with held(bench, call=2) as reached:
        job = bench.run()
        assert reached.wait(LONG)
        front_end(bench.controls, kind="stop")
        assert bench.controls.status == "stopping"
    with pytest.raises(RunStopped):
        job.result(LONG)
    assert bench.controls.status == "idle"
    assert bench.source is source
    assert bench.images.cards == cards
    assert bench.patch(SITE, 2).result(LONG).record is bench.patched


def test_stopped_first_run_shows_how_far_it_came():
    with opened() as bench:
        with held(bench, call=3) as reached:
            job = bench.run()
            assert reached.wait(LONG)
            bench.stop()
        with pytest.raises(RunStopped):
            job.result(LONG)
        assert bench.source is None
        assert [lane["label"] for lane in bench.scrubber.lanes] == ["stopped"]
        assert [row["step"] for row in bench.scrubber.rows] == list(range(len(bench.scrubber.rows)))
        assert 2 <= len(bench.scrubber.rows) <= 3


def test_patch_asked_for_during_a_run_does_not_mix_pairs(bench):
    with held(bench) as reached:
        run = bench.run()
        assert reached.wait(LONG)
        patch = bench.patch("unet.conv_in", 0)
        fill = bench.fill()
    pair = run.result(LONG)
    with pytest.raises(RunStopped, match="no longer on screen"):
        patch.result(LONG)
    for job in fill:
        job.result(LONG)
    until(lambda: bench.map.status == "idle")
    assert bench._pair is pair
    assert np.isnan(bench.map.array()).all()
    assert "unet.conv_in" not in bench.map.sites
    until(lambda: bench.map.noise_floor is not None)


@pytest.fixture
def fresh():
    with opened() as bench:
        bench.run().result(LONG)
        until(lambda: bench.map.noise_floor is not None)
        yield bench


def test_fill_computes_the_missing_and_stop_ends_it(fresh):
    bench = fresh
    bench.set_window("1")
    sites = len(bench.map.sites)
    bench._pair.seconds = 0.01
    groups = bench._pair.map.groups()
    assert sum(map(len, groups)) == 4 * sites
    # Four calls tell whether rows go together; the first rows, of the first column, take four.
    with held(bench, call=9) as reached:
        jobs = bench.fill()
        assert len(jobs) == len(groups) < 4 * sites
        assert bench.map.status == "running"
        assert reached.wait(LONG)
        front_end(bench.map, kind="stop")
        assert bench.map.status == "idle"
    until(lambda: all(job.done for job in jobs))
    done = np.isfinite(bench.map.array())
    assert done.sum() == len(groups[0])
    del bench._pair.map.sites[2:]
    bench._screen.draw_map(bench._pair)
    left = int(np.isnan(bench.map.array()).sum())
    jobs = bench.fill()
    for job in jobs:
        job.result(LONG)
    assert np.isfinite(bench.map.array()).all()
    assert bench.map.status == "idle"
    assert bench.map.progress == {"done": left, "of": left}
    assert bench.fill() == []


def test_export_writes_what_is_on_screen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.sd1().save_pretrained(tmp_path / "model")
    with opened(lambda: str(tmp_path / "model")) as bench:
        bench.run().result(LONG)
        bench.patch(SITE, 0).result(LONG)
        front_end(bench.code, kind="export", format="standalone")
        until(lambda: bench.code.status == "saved to experiment-standalone-1.py")
        assert "import workbench" not in (tmp_path / "experiment-standalone-1.py").read_text()
        assert bench.export("standalone").name == "experiment-standalone-2.py"
        assert bench.export("workbench").read_text().startswith(bench.code.code)
        assert json.loads(bench.export("experiment").read_text())["interventions"][0]["site"] == SITE
        assert bench.export("workbench", tmp_path / "mine.py") == tmp_path / "mine.py"
        front_end(bench.code, kind="export", format="workbench")
        assert sorted(path.name for path in tmp_path.glob("experiment*")) == [
            "experiment-1.json",
            "experiment-standalone-1.py",
            "experiment-standalone-2.py",
            "experiment-workbench-1.py",
            "experiment-workbench-2.py",
        ]


MANY = (
    ScaleSpec(site="unet.mid_block", factor=2.0, steps=(1,)),
    ReweightSpec(words={"circle": 3.0}),
)
KINDS_OF_EXPERIMENT = {
    "a cell": ((PatchSpec(site=SITE, steps=(0, 1), branch="cond"),), ()),
    "two changes": (MANY, ()),
    "branches": (MANY[:1], (Fork(step=2, prompt="a green circle"),)),
    "nothing": ((), ()),
}


@pytest.mark.parametrize("kind", list(KINDS_OF_EXPERIMENT))
def test_what_was_exported_opens_again(tmp_path, kind):
    folder = tmp_path / "model"
    tiny.sd1().save_pretrained(folder)
    interventions, forks = KINDS_OF_EXPERIMENT[kind]
    experiment = Experiment(
        model=str(folder),
        source="a red circle",
        target="a blue circle",
        seed=7,
        num_inference_steps=4,
        guidance_scale=3.0,
        interventions=interventions,
        forks=forks,
    )
    outcome = experiment.run()
    with Workbench.open(experiment) as bench:
        until(lambda: bench.controls.status == "done")
        assert bench.experiment == experiment
        shown = [card["label"] for card in bench.images.cards]
        assert shown[4:] == (["branch-0"] if forks else [])
        if interventions:
            assert bench.patched.images[0].tobytes() == outcome.patched.images[0].tobytes()
            assert bench.map.selected == ([bench.map.sites.index(SITE), 0] if kind == "a cell" else [])
        paths = [bench.export(each, tmp_path / name) for each, name in FORMATS.items()]
    for path in paths:
        with opened(lambda: str(folder)) as bench:
            bench.run().result(LONG)
            bench.patch(SITE, 1).result(LONG)
            bench.load(path).result(LONG)
            assert bench.experiment == experiment
            assert bench.map.selected == ([bench.map.sites.index(SITE), 0] if kind == "a cell" else [])
            assert (bench.controls.seed, bench.controls.guidance) == (7, 3.0)


def test_an_experiments_scheduler_is_the_apps_for_as_long_as_it_is_open(tmp_path):
    tiny.sd1().save_pretrained(tmp_path / "model")
    model = DiffusionModel(str(tmp_path / "model"))
    model.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(model.pipeline.scheduler.config)
    prompts = {"source": "a red circle", "target": "a blue circle"}
    patch = PatchSpec(site=SITE)
    plain = Experiment(model=model.reference, num_inference_steps=4, interventions=[patch], **prompts)
    told = plain.pinned(model)
    expected = told.run(model).patched.images[0].tobytes()
    for name, each in (("plain", plain), ("told", told)):
        each.save(tmp_path / f"{name}.json")
    with opened(lambda: model.reference) as bench:
        own = bench.controls.scheduler
        bench.load(tmp_path / "told.json").result(LONG)
        assert bench.controls.scheduler == "DPMSolverMultistep" != own
        assert bench.patched.images[0].tobytes() == expected
        bench.load(tmp_path / "plain.json").result(LONG)
        assert bench.controls.scheduler == own
        assert bench.patched.images[0].tobytes() != expected


def test_a_file_that_is_opened_in_the_browser(bench, tmp_path):
    told = bench.experiment.model_copy(update={"seed": 4})
    told.save(tmp_path / "x.json")
    text = (tmp_path / "x.json").read_text()
    front_end(bench.code, kind="open", name="x.json", text=text)
    until(lambda: bench.controls.status == "done" and bench.controls.seed == 4)
    front_end(bench.code, kind="open", name="x.py", text=text)
    assert "x.py is no experiment" in bench.controls.error["text"]
    front_end(bench.controls, kind="dismiss")


def test_an_experiment_of_another_model_is_refused(tmp_path):
    with opened("shapes-unet".__str__) as bench:
        other = Experiment(model="shapes-ddpm", num_inference_steps=2)
        with pytest.raises(InputError, match=r"shapes-ddpm.*shapes-unet"):
            bench.load(other)
        wanted = Experiment(
            model="shapes-unet", source="a red circle", target="a blue circle", weights=f"sha256:{'0' * 64}"
        )
        with pytest.raises(InputError, match="weights"):
            bench.load(wanted).result(LONG)
        assert bench.experiment.weights is None


def test_export_that_cannot_be_written_is_shown(bench, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="cannot be written"):
        bench.export("workbench", tmp_path / "nowhere" / "x.py")


HOSTILE = [
    ("controls", {"kind": "exec", "code": "1"}),
    ("controls", {"kind": "run", "steps": 9}),
    ("map", {"kind": "cell", "row": 999, "column": 0}),
    ("map", {"kind": "cell", "row": -1, "column": 0}),
    ("map", {"kind": "cell", "row": "0", "column": 0}),
    ("map", {"kind": "window", "value": "all"}),
    ("code", {"kind": "export", "format": "../../etc/passwd"}),
]


@pytest.mark.parametrize(("view", "content"), HOSTILE)
def test_hostile_messages_are_refused(bench, view, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    widget = getattr(bench, view)
    widget.rejected.clear()
    before = bench.experiment
    front_end(widget, **content)
    assert len(widget.rejected) == 1
    assert bench.experiment == before
    assert not bench._worker.busy
    assert list(tmp_path.iterdir()) == []


def test_browser_cannot_write_what_is_ours(bench):
    bench.controls.set_state({"status": "running", "model_name": "x", "seed": -1, "steps": 10**9})
    bench.code.set_state({"code": "import os"})
    assert bench.controls.status == "done"
    assert bench.controls.steps == 4
    assert "import os" not in bench.code.code


def test_settings_that_make_no_sense_are_refused_when_opening():
    for asked in ({"steps": 0}, {"steps": -3}, {"seed": -1}, {"guidance": 1e9}, {"source_from": 99}):
        with pytest.raises(InputError):
            Workbench(tiny.sd1(), **asked)
    with pytest.raises(UnknownNameError):
        Workbench("shapes-nowhere")


def test_close_leaves_no_thread_and_no_hook():
    pipeline = tiny.sd1()
    pipeline("a red circle", num_inference_steps=1)
    before, threads = footprint(pipeline), set(threading.enumerate())
    with Workbench(pipeline, steps=4) as bench:
        bench.run().result(LONG)
        assert set(threading.enumerate()) - threads
        bench.fill()
    until(lambda: not [each for each in set(threading.enumerate()) - threads if each.name == "workbench"])
    assert footprint(pipeline) == before
    with pytest.raises(RunStopped):
        bench.run().result(LONG)
