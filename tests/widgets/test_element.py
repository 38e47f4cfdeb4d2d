import gc
import os
import subprocess
import sys
import weakref

import pytest

from tests.widgets import scene
from workbench.errors import InputError, LoadError, UnknownNameError
from workbench.widgets import element
from workbench.widgets.code import CodeView, Export
from workbench.widgets.controls import RunControls
from workbench.widgets.images import ImageStrip
from workbench.widgets.patch_map import Cell, PatchMap
from workbench.widgets.scrubber import StepScrubber
from workbench.widgets.tree import ComponentTree

ALL = [ComponentTree, RunControls, StepScrubber, PatchMap, ImageStrip, CodeView]


def browser_sends(widget, content):
    widget._handle_custom_msg(content, [])


@pytest.mark.parametrize("make", ALL)
def test_closed_widget_is_collected(make):
    widget = make()
    gone = weakref.ref(widget)
    widget.close()
    del widget
    gc.collect()
    assert gone() is None


def test_open_widget_is_kept():
    """The control of the test above: before close() the widget is held."""
    widget = RunControls()
    kept = weakref.ref(widget)
    del widget
    gc.collect()
    assert kept() is not None
    kept().close()


def test_collected_with_a_handler_that_knows_the_widget():
    def make_and_close():
        widget = RunControls()
        widget.on("run", lambda message: widget.status)
        widget.close()
        return weakref.ref(widget)

    gone = make_and_close()
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("make", ALL)
def test_bundle_is_inline_text(make):
    text = make()._esm
    assert "export" in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert "https://" not in text
    assert len(text) < 100 * 1024


def test_missing_bundle_says_what_to_run(monkeypatch, tmp_path):
    monkeypatch.setattr(element, "STATIC", tmp_path)
    element.bundle_text.cache_clear()
    with pytest.raises(LoadError, match="make setup"):
        RunControls()
    element.bundle_text.cache_clear()


def test_developers_get_the_file_itself():
    program = (
        "from anywidget._file_contents import FileContents\n"
        "from workbench.widgets.controls import RunControls\n"
        "assert isinstance(RunControls.__dict__['_esm'], FileContents) and 'export' in RunControls()._esm"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "WORKBENCH_DEV": "1", "ANYWIDGET_HMR": "0"},
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("make", ALL)
def test_unknown_argument_is_refused(make):
    with pytest.raises(InputError, match="takes no argument 'colour'"):
        make(colour="red")


def test_unknown_argument_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'scheduler'"):
        RunControls(shedule="DDIM")


@pytest.mark.parametrize("name", ["_esm", "comm", "keys", "log", "_model_module"])
def test_inner_traits_are_no_arguments(name):
    with pytest.raises(InputError):
        RunControls(**{name: None})


def test_value_that_does_not_fit_is_an_input_error():
    with pytest.raises(InputError, match="seed"):
        RunControls(seed=-1)


def test_valid_message_reaches_its_handlers_validated():
    widget, seen = scene.patch_map(), []
    widget.on("cell", seen.append)
    browser_sends(widget, {"kind": "cell", "row": 3, "column": 5})
    assert seen == [Cell(kind="cell", row=3, column=5)]
    assert not widget.rejected


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "cell", "row": 3},
        {"kind": "cell", "row": "3", "column": 5},
        {"kind": "cell", "row": -1, "column": 5},
        {"kind": "cell", "row": 7, "column": 0},
        {"kind": "cell", "row": 0, "column": scene.STEPS},
        {"kind": "cell", "row": True, "column": 5},
        {"kind": "cell", "row": 1, "column": 5, "code": "import os"},
        {"kind": "window", "value": "all"},
        {"kind": "execute", "code": "1"},
        {"kind": ["cell"]},
        {"row": 1, "column": 5},
        "cell",
        None,
        [1, 2],
    ],
)
def test_other_messages_are_kept_and_not_obeyed(content):
    widget, seen = scene.patch_map(), []
    for kind in widget._messages:
        widget.on(kind, seen.append)
    browser_sends(widget, content)
    assert seen == []
    assert [entry.content for entry in widget.rejected] == [content]
    assert widget.rejected[0].reason


def test_rejected_entries_are_bounded():
    widget = RunControls()
    for n in range(500):
        browser_sends(widget, {"kind": f"{n}"})
    assert len(widget.rejected) == 50
    assert widget.rejected[-1].content == {"kind": "499"}


def test_export_takes_only_formats_on_offer():
    widget, seen = scene.code(), []
    widget.on("export", seen.append)
    browser_sends(widget, {"kind": "export", "format": "../../etc"})
    browser_sends(widget, {"kind": "export", "format": "JSON"})
    assert seen == [Export(kind="export", format="JSON")]


def test_handler_for_an_unknown_kind_is_refused():
    with pytest.raises(UnknownNameError, match="'run'"):
        RunControls().on("ran", print)


def test_browser_changes_only_editable_traits():
    widget = scene.code()
    widget.set_state({"code": "import os", "_esm": "alert(1)", "formats": ["x"]})
    assert widget.code == scene.CODE
    assert widget._esm != "alert(1)"
    assert len(widget.rejected) == 3


def test_browser_value_that_does_not_fit_is_refused_alone():
    widget = RunControls()
    widget.set_state({"seed": -4, "steps": 30, "guidance": "high", "source": "a blue circle"})
    assert (widget.seed, widget.steps, widget.guidance, widget.source) == (0, 30, 4.0, "a blue circle")
    assert len(widget.rejected) == 2


@pytest.mark.parametrize("make", ALL)
def test_fallback_stands_beside_the_live_view(make):
    data, _ = make()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert data["text/plain"].startswith(make.__name__)
    assert data.keys() & {"text/html", "image/png"}


def test_fallback_shows_content():
    assert "UNet2DConditionModel" in scene.tree().fallback_html()
    assert "a red circle left of a blue square" in scene.controls().fallback_html()
    assert scene.scrubber().fallback_html().count("data:image/png") == 3
    assert scene.images().fallback_html().count("data:image/png") == 4
    assert "noise floor 0.118" in scene.images().fallback_html()
    assert scene.patch_map()._repr_mimebundle_()[0]["image/png"].startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "widget",
    [
        lambda: RunControls(source=scene.HOSTILE),
        lambda: CodeView(code=scene.HOSTILE),
        lambda: ImageStrip(
            cards=[{"label": scene.HOSTILE, "png": b"x", "caption": scene.HOSTILE}], note=scene.HOSTILE
        ),
        lambda: StepScrubber(lanes=[{"label": scene.HOSTILE, "frames": {}, "final": None}]),
        lambda: ComponentTree(nodes=[scene.node(scene.HOSTILE, scene.HOSTILE, 0)]),
    ],
)
def test_fallback_escapes_prompts(widget):
    made = widget().fallback_html()
    assert "<img src=x" not in made
    assert "</script>" not in made
