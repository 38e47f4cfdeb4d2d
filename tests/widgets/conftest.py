"""Fixtures that open saved pages of widgets in Debian's Chromium and watch what they do."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, Request, sync_playwright

from workbench.widgets.page import Rows, save_html

ARTIFACTS = Path(__file__).parents[1] / "artifacts" / "widgets"
CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
# A fingerprint of what a canvas shows.
_HASH = """canvas => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let hash = 2166136261;
  for (const value of data) hash = Math.imul(hash ^ value, 16777619);
  return hash;
}"""
_PIXEL = """([canvas, x, y]) => [...canvas.getContext("2d").getImageData(
  Math.floor(x * canvas.width), Math.floor(y * canvas.height), 1, 1).data]"""


@dataclass
class WidgetPage:
    """A saved page in a browser, with its complaints and its requests."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def model(self, name: str, trait: str) -> Any:
        """What a widget's model holds for a trait; ``name`` is the bundle."""
        return self.page.evaluate("([n, t]) => workbenchModels[n].get(t)", [self.index(name), trait])

    def put(self, name: str, trait: str, value: object) -> None:
        """Changes a trait as the kernel would."""
        self.page.evaluate("([n, t, v]) => workbenchModels[n].set(t, v)", [self.index(name), trait, value])

    def sent(self, name: str) -> list[dict[str, Any]]:
        """The messages that a widget sent."""
        return self.page.evaluate("n => workbenchModels[n].sent", self.index(name))

    def index(self, name: str) -> int:
        kinds = self.page.locator(".wb").evaluate_all("all => all.map(one => one.dataset.widget)")
        return kinds.index(name)

    def fingerprint(self, canvas: Locator) -> int:
        self.settle()
        return canvas.evaluate(_HASH)

    def pixel(self, canvas: Locator, x: float, y: float) -> list[int]:
        """RGBA at a place given in parts of the canvas."""
        self.settle()
        return self.page.evaluate(_PIXEL, [canvas.element_handle(), x, y])

    def until(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        """Waits for something that the browser does in its own time, such as decoding."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come about"
            self.page.wait_for_timeout(20)

    def settle(self) -> None:
        """Waits for two frames: what was asked for is drawn by then."""
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        )

    def screenshot(self, name: str) -> None:
        self.settle()
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=True)


# Not for the whole session: while Playwright runs, an event loop runs in this thread.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        reason = "needs Chromium on the PATH (Debian: apt-get install chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_ARGS)
        yield browser
        browser.close()


OpenWidgets = Callable[..., WidgetPage]


@pytest.fixture
def open_widgets(chromium: Browser, tmp_path: Path) -> Iterator[OpenWidgets]:
    """A function that saves widgets and opens the page; at the end every page must have been quiet.

    ``live=True`` lets the widgets believe in a kernel, so that their buttons work.
    """
    opened: list[WidgetPage] = []

    def open_page(rows: Rows, *, live: bool = False, theme: str = "light", width: int = 1280) -> WidgetPage:
        path = save_html(rows, tmp_path / f"{len(opened)}.html", title="widgets")
        if live:
            path.write_text(path.read_text("utf-8").replace('"_saved":true', '"_saved":false'), "utf-8")
        page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        watched = WidgetPage(page)
        page.on(
            "console", lambda line: watched.complaints.append(line.text) if line.type == "error" else None
        )
        page.on("pageerror", lambda error: watched.complaints.append(str(error)))
        page.on("dialog", lambda dialog: (watched.complaints.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: watched.requests.append(_origin(request)))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        watched.until(lambda: page.locator('.scrub-frame[data-state="pending"]').count() == 0)
        watched.settle()
        opened.append(watched)
        return watched

    yield open_page
    for watched in opened:
        watched.page.close()
        assert watched.complaints == []
        assert set(watched.requests) <= {"file", "blob", "data"}


def _origin(request: Request) -> str:
    return request.url.split(":", 1)[0]
