"""Frames a second while scrubbing, in a real browser, on a page without a kernel."""

from __future__ import annotations

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

import workbench as wb
from tests.browser.conftest import CHROMIUM_ARGS

_FRAMES = 240
_SCRUB = """async count => {
    const slider = document.querySelector('[role=slider]');
    slider.focus();
    const frame = () => new Promise(requestAnimationFrame);
    await frame(); await frame();
    const began = performance.now();
    for (let i = 0; i < count; i++) {
        const key = Math.floor(i / 19) % 2 ? 'ArrowRight' : 'ArrowLeft';
        slider.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true }));
        await frame();
    }
    return count / (performance.now() - began) * 1000;
}"""


def frames_per_second(record: wb.Record, page_path: Path) -> float | None:
    """Scrub back and forth through a record's saved page, one step a frame.

    Args:
        record: a run of 20 steps.
        page_path: where the page is written.

    Returns:
        Frames a second, at most the browser's 60; None without a Chromium on the PATH.
    """
    program = shutil.which("chromium")
    if program is None:
        return None
    wb.save_html(record, page_path)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_ARGS)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(page_path.as_uri())
        page.get_by_role("slider", name="Step").wait_for()
        page.wait_for_timeout(500)
        measured: float = page.evaluate(_SCRUB, _FRAMES)
        browser.close()
    return measured
