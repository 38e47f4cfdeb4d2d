"""Fixtures that drive a real JupyterLab in Debian's Chromium.

A test asks for `open_notebook` and gets a function; what that returns is a `NotebookPage`:

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_tour_runs(open_notebook, theme):
        tour = open_notebook(Path("notebooks/00_tour.ipynb"), theme=theme)   # a copy of it
        tour.run_all(seconds=300)                                            # fails if a cell raised
        tour.page.get_by_role("button", name="Run").click()                  # any Playwright call
        tour.screenshot(f"tour-{theme}")                                     # tests/artifacts/browser/

When the test ends, each page it opened must have been quiet (no error on the console, no request to
another machine) and its kernels are stopped. Chromium itself resolves no name but localhost.

All tests here are marked `browser`; without Chromium they are skipped, but fail where CI is set.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.browser.lab import Lab, serve
from tests.browser.notebook_page import NotebookPage

CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
]


class OpenNotebook(Protocol):
    """What the `open_notebook` fixture is."""

    def __call__(
        self,
        notebook: Path | Sequence[str],
        *,
        theme: str = "light",
        size: tuple[int, int] = (1400, 1000),
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> NotebookPage:
        """Opens a copy of a notebook on a page of its own, its kernel started, no cell run.

        Args:
            notebook: a file, or the sources of the code cells of a new notebook.
            theme: "light" or "dark".
            size: of the window, in CSS pixels.
            settings: overrides of JupyterLab's settings, by plugin.
        """


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks everything in this folder `browser`."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A JupyterLab server, one for all tests."""
    with serve(tmp_path_factory.mktemp("lab")) as running:
        yield running


# Not for the whole session: while Playwright runs, an event loop runs in this thread, and the tests of
# other folders could not start theirs.
@pytest.fixture(scope="package")
def chromium() -> Iterator[Browser]:
    """A headless Chromium, one for all tests of this folder."""
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


@pytest.fixture
def open_notebook(lab: Lab, chromium: Browser) -> Iterator[OpenNotebook]:
    """A function that opens notebooks; see `OpenNotebook` and the top of this file."""
    opened: list[NotebookPage] = []
    cleanups: list[Callable[[], None]] = []

    def open_one(
        notebook: Path | Sequence[str],
        *,
        theme: str = "light",
        size: tuple[int, int] = (1400, 1000),
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> NotebookPage:
        lab.use(theme, settings)
        path = lab.add(notebook)
        context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, accept_downloads=True)
        cleanups.append(context.close)
        page = NotebookPage(context.new_page(), lab.root / path)
        opened.append(page)
        page.go(lab.address(path))
        return page

    yield open_one
    for clean in cleanups:
        clean()
    lab.stop_kernels()
    for page in opened:
        page.assert_quiet()
