"""The tour, driven as a person would: run, scrub, click a word, click a patch cell, export."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import OpenNotebook
from tests.browser.notebook_page import NotebookPage

TOUR = Path(__file__).parents[2] / "notebooks" / "00_tour.ipynb"
SIZE = (1440, 1600)
APP = 3
"""The index of the cell that shows the app."""

PIXELS = """canvas => {
    const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    let sum = 0; for (let i = 0; i < data.length; i++) sum = (sum * 31 + data[i]) >>> 0;
    return sum;
}"""
IN_KERNEL = """code => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
    .requestExecute({ code }).done.then(reply => reply.content.status)"""
START_IN_KERNEL = """code => { window.jupyterapp.shell.currentWidget.sessionContext.session.kernel
    .requestExecute({ code }); }"""


class Tour:
    """The tour's app on a page."""

    def __init__(self, notebook: NotebookPage) -> None:
        self.notebook = notebook
        self.page: Page = notebook.page
        self.app = notebook.cell(APP).locator(".jp-OutputArea-output")
        self.slider = self.app.get_by_role("slider", name="Step")
        self.lanes = self.app.locator("canvas[aria-label*=', step ']")
        self.heat_map = self.app.locator(".map-grid")

    def picture(self, index: int) -> int:
        """Return a number that stands for the pixels of a lane."""
        return int(self.lanes.nth(index).evaluate(PIXELS))

    def card(self, label: str) -> Locator:
        """Return a card of the image strip."""
        return self.app.locator("figure.card", has_text=label)

    def in_kernel(self, code: str) -> None:
        """Execute code in the notebook's kernel, which must succeed."""
        assert self.page.evaluate(IN_KERNEL, code) == "ok"

    def click_cell(self, row: int, column: int) -> None:
        """Click the middle of a cell of the patch map."""
        canvas = self.heat_map.locator("canvas")
        box = canvas.bounding_box()
        assert box is not None
        rows, columns = 19, 20
        canvas.click(
            position={"x": box["width"] * (column + 0.5) / columns, "y": box["height"] * (row + 0.5) / rows}
        )


@pytest.fixture
def tour(open_notebook: OpenNotebook) -> Tour:
    """The tour in the light theme, every cell run."""
    notebook = open_notebook(TOUR, size=SIZE)
    notebook.run_all(seconds=600)
    return Tour(notebook)


def test_the_tour_in_a_browser(tour: Tour) -> None:
    tour.lanes.nth(2).wait_for(timeout=60_000)
    assert tour.page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    scrubbing_needs_no_kernel(tour)
    a_word_lays_its_attention_over_the_image(tour)
    a_cell_patches(tour)
    script = the_exported_script_makes_the_image_on_screen(tour)
    the_script_opens_in_the_app(tour, script)
    a_bad_prompt_is_said_in_the_app(tour)
    a_run_can_be_stopped(tour)
    tour.notebook.screenshot("tour-light")


def scrubbing_needs_no_kernel(tour: Tour) -> None:
    tour.slider.focus()
    tour.slider.press("End")
    last = tour.picture(1)
    tour.page.evaluate(START_IN_KERNEL, "import time; time.sleep(5)")
    seen = set()
    for _ in range(6):
        tour.slider.press("ArrowLeft")
        tour.page.wait_for_timeout(60)
        seen.add(tour.picture(1))
    assert (
        tour.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.kernelDisplayStatus")
        == "busy"
    )
    assert len(seen - {last}) == 6
    tour.slider.press("End")
    expect(tour.slider).to_have_attribute("aria-valuenow", "19")
    tour.notebook.wait_idle()


def a_word_lays_its_attention_over_the_image(tour: Tour) -> None:
    plain = tour.picture(1)
    chip = tour.app.get_by_role("button", name="circle", exact=True)
    chip.click()
    expect(chip).to_have_attribute("aria-pressed", "true")
    tour.page.wait_for_timeout(200)
    assert tour.picture(1) != plain
    tour.notebook.screenshot("tour-attention")
    chip.click()
    tour.page.wait_for_timeout(200)
    assert tour.picture(1) == plain


def a_cell_patches(tour: Tour) -> None:
    expect(tour.app.get_by_label("from step")).to_have_value("10")
    before = tour.app.get_by_role("region", name="Python code").inner_text()
    tour.click_cell(7, 13)
    code = tour.app.get_by_role("region", name="Python code")
    expect(code).to_contain_text("unet.mid_block", timeout=60_000)
    assert code.inner_text() != before
    expect(tour.card("Δ")).to_be_visible()
    tour.click_cell(18, 14)
    expect(code).to_contain_text("transformer_blocks.0.attn2", timeout=60_000)
    expect(code).to_contain_text("target.fork")
    expect(tour.card("target").first).to_contain_text("blue circle")
    expect(tour.card("patched").first).to_contain_text("red circle")


def the_exported_script_makes_the_image_on_screen(tour: Tour) -> Path:
    tour.app.get_by_role("button", name="Export").click()
    status = tour.app.locator(".code-status")
    expect(status).to_contain_text("saved to", timeout=30_000)
    folder = tour.notebook.file.parent
    script = folder / status.inner_text().removeprefix("saved to ").strip()
    tour.in_kernel("bench.patched.images[0].save('on_screen.png')")
    out = folder / "by_script.png"
    subprocess.run(
        [sys.executable, str(script), "--out", str(out)], check=True, capture_output=True, timeout=300
    )
    made, shown = np.asarray(Image.open(out)), np.asarray(Image.open(folder / "on_screen.png"))
    assert made.tobytes() == shown.tobytes()
    assert len(np.unique(made.reshape(-1, 3), axis=0)) > 10
    return script


def the_script_opens_in_the_app(tour: Tour, script: Path) -> None:
    code = tour.app.get_by_role("region", name="Python code")
    tour.click_cell(7, 13)
    expect(code).to_contain_text("unet.mid_block", timeout=60_000)
    tour.in_kernel("import time\nwhile bench._worker.busy: time.sleep(0.05)")
    tour.app.get_by_label("Experiment to open").set_input_files(script)
    expect(code).to_contain_text("transformer_blocks.0.attn2", timeout=60_000)
    expect(tour.card("patched").first).to_contain_text("red circle")
    tour.in_kernel(
        "from PIL import Image\n"
        "assert bench.patched.images[0].tobytes() == Image.open('on_screen.png').tobytes()"
    )
    tour.notebook.screenshot("tour-opened")


def a_bad_prompt_is_said_in_the_app(tour: Tour) -> None:
    field = tour.app.get_by_label("target", exact=True)
    kept = field.input_value()
    field.fill("")
    tour.app.get_by_role("button", name="Run").click()
    alert = tour.app.get_by_role("alert").filter(has_text="The prompt is empty")
    expect(alert).to_be_visible(timeout=30_000)
    tour.notebook.screenshot("tour-error")
    field.fill(kept)
    assert tour.lanes.count() >= 2


def a_run_can_be_stopped(tour: Tour) -> None:
    tour.app.get_by_role("textbox", name="Steps", exact=True).fill("400")
    tour.app.get_by_role("button", name="Run").click()
    tour.app.get_by_role("button", name="Stop").first.click(timeout=30_000)
    expect(tour.app.get_by_role("alert").filter(has_text="Stopped in step")).to_be_visible(timeout=60_000)
    assert tour.lanes.count() >= 2
    tour.in_kernel("assert bench.target is not None and len(bench.target.ledger) == 20")


def test_the_tour_in_the_dark(open_notebook: OpenNotebook) -> None:
    notebook = open_notebook(TOUR, theme="dark", size=SIZE)
    notebook.run_all(seconds=600)
    tour = Tour(notebook)
    tour.lanes.nth(2).wait_for(timeout=60_000)
    picture = Image.open(notebook.screenshot("tour-dark")).convert("L")
    assert np.median(np.asarray(picture)) < 80
