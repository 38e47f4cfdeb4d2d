"""Views straight from a model or from records."""

from __future__ import annotations

import pytest

from tests import tiny
from workbench.attention.request import Attention
from workbench.errors import InputError
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record, RunSpec
from workbench.widgets.views import component_tree, save_html, show, step_scrubber

SETTINGS = {"num_inference_steps": 2, "seed": 0}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(tiny.sd1())


@pytest.fixture(scope="module")
def record(model):
    return model.record("a red <b>circle</b>", capture=[Attention()], **SETTINGS)


def test_tree_is_the_models(model):
    tree = component_tree(model, variable="mine")
    assert tree.variable == "mine"
    assert {"unet", "unet.mid_block", "vae", "scheduler"} <= {node["path"] for node in tree.nodes}


def test_scrubber_of_one_run(record):
    view = step_scrubber(record)
    assert [lane["label"] for lane in view.lanes] == ["a red <b>circle</b>"]
    assert view.kinds == ["predicted x₀", "latents", "noise"]
    assert view.kind == "predicted x₀"
    assert len(view.rows) == len(view.curve) == 2
    assert view.attention["lane"] == 0
    assert "circle" in [token["text"] for token in view.attention["tokens"]]


def test_attention_lies_on_the_last_run_that_has_it(model, record):
    plain = model.record("a blue square", **SETTINGS)
    assert step_scrubber(plain).attention == {}
    assert step_scrubber(record, plain).attention["lane"] == 0
    assert step_scrubber(plain, record).attention["lane"] == 1


@pytest.mark.parametrize("given", [(), (Record(RunSpec()),), ("record",)])
def test_something_else_is_refused(given):
    with pytest.raises(InputError, match=r"wb\.step_scrubber\(record\)"):
        step_scrubber(*given)


def test_runs_without_pictures_or_words_have_a_scrubber():
    for name, kinds in (("ddpm", {"predicted x₀", "latents", "noise"}), ("wan", set())):
        case = tiny.CASES[name]
        view = step_scrubber(DiffusionModel(case.build()).record(**case.arguments, seed=0))
        assert set(view.kinds) == kinds
        assert view.lanes[0]["label"] in ("run 1", "a red circle")


def test_page_holds_the_run_and_escapes_its_prompt(record, tmp_path):
    for what in (record, [record], step_scrubber(record)):
        written = save_html(what, tmp_path / "run.html", title="Mine <x>")
        text = written.read_text(encoding="utf-8")
        assert "<b>circle" not in text
        assert "Mine &lt;x&gt;" in text
        assert len(text) > 10_000


def test_notebook_shows_models_and_records(model, record):
    for value, kind in ((model, "ComponentTree"), (record, "StepScrubber")):
        data, _ = show(value)
        assert data["text/plain"].startswith(kind)
        assert "application/vnd.jupyter.widget-view+json" in data
