"""The fixtures themselves: a widget is drawn in both themes, and each check fires when it should."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.browser.conftest import OpenNotebook

SLIDER = ["import ipywidgets\nipywidgets.IntSlider(value=42)"]


def brightness(screenshot: Path) -> float:
    """Returns the mean grey level of a picture, 0 to 255."""
    histogram = Image.open(screenshot).convert("L").histogram()
    return sum(level * count for level, count in enumerate(histogram)) / sum(histogram)


@pytest.mark.parametrize(("theme", "darkest", "brightest"), [("light", 180, 255), ("dark", 0, 80)])
def test_a_widget_is_drawn_in_the_theme(
    open_notebook: OpenNotebook, theme: str, darkest: int, brightest: int
) -> None:
    notebook = open_notebook(SLIDER, theme=theme)
    notebook.run_all()
    slider = notebook.cell(0).locator(".widget-slider")
    slider.wait_for()
    assert slider.locator(".widget-readout").inner_text() == "42"
    assert darkest <= brightness(notebook.screenshot(f"slider-{theme}")) <= brightest


def test_a_widget_reaches_its_kernel(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(
        ["import ipywidgets\nslider = ipywidgets.IntSlider(value=42)\nlabel = ipywidgets.Label()\n"
         "slider.observe(lambda change: setattr(label, 'value', f'now {change.new}'), 'value')\n"
         "ipywidgets.VBox([slider, label])"]
    )  # fmt: skip
    notebook.run_all()
    notebook.cell(0).locator(".noUi-handle").press("ArrowRight")
    notebook.page.get_by_text("now 43").wait_for()


def test_the_kernel_is_this_interpreter(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(["import sys\nprint(sys.executable, end='')"])
    notebook.run_all()
    assert notebook.outputs()[0][0]["text"] == sys.executable


def test_a_cell_that_raises_fails_the_run(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(["1 + 1", "1 / 0"])
    with pytest.raises(AssertionError, match="cell 1: ZeroDivisionError: division by zero"):
        notebook.run_all()


def test_console_errors_and_foreign_requests_are_seen(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(SLIDER)
    notebook.assert_quiet()
    notebook.page.evaluate("() => console.error('a test of errors')")
    with notebook.page.expect_console_message(lambda message: "ERR_NAME_NOT_RESOLVED" in message.text):
        notebook.page.evaluate("() => { fetch('http://elsewhere.invalid/').catch(() => null); }")
    assert notebook.left_the_machine() == ["http://elsewhere.invalid/"]
    assert any("a test of errors" in error for error in notebook.console_errors)
    with pytest.raises(AssertionError, match="a test of errors"):
        notebook.assert_quiet()
    notebook.console_errors.clear()
    notebook.requests.clear()
