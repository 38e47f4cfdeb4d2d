"""A notebook, open in JupyterLab in a browser."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Locator, Page

ARTIFACTS = Path(__file__).parent.parent / "artifacts" / "browser"
LOCAL_HOSTS = {"127.0.0.1", "localhost"}
NETWORK_SCHEMES = {"http", "https", "ws", "wss"}

IS_IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
# The promise is kept aside, so that the wait for it can have a limit.
START = """([command, args]) => {
    window.testRun = { done: false, error: null };
    window.jupyterapp.commands.execute(command, args).then(
        () => { window.testRun.done = true; },
        (error) => { window.testRun.done = true; window.testRun.error = String(error); },
    );
}"""


class NotebookPage:
    """One notebook in one browser page; what the `open_notebook` fixture returns.

    Attributes:
        page: the Playwright page, for everything that has no method here.
        file: the notebook's file in the server's folder; scripts that it exports lie beside it.
        console_errors: the errors on the page's console so far, and its uncaught exceptions.
        requests: the URLs of all requests and web sockets so far, of every frame and worker.
    """

    def __init__(self, page: Page, file: Path) -> None:
        self.page = page
        self.file = file
        self.console_errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.console_errors.append(str(error)))
        page.on("websocket", lambda socket: self.requests.append(socket.url))
        page.context.on("request", lambda request: self.requests.append(request.url))

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.console_errors.append(f"{message.text} ({message.location.get('url', '')})")

    def go(self, address: str, seconds: float = 180) -> None:
        """Opens `address` and waits until the notebook is shown and its kernel is idle."""
        self.page.goto(address, timeout=seconds * 1000)
        self.page.locator(".jp-NotebookPanel:visible .jp-Cell").first.wait_for(timeout=seconds * 1000)
        self.wait_idle(seconds)

    def wait_idle(self, seconds: float = 120) -> None:
        """Waits until the kernel has nothing to do."""
        self.page.wait_for_function(IS_IDLE, timeout=seconds * 1000)

    def execute(self, command: str, args: dict[str, Any] | None = None, seconds: float = 120) -> None:
        """Executes a command of JupyterLab's palette, by its id, and waits until it has ended."""
        self.page.evaluate(START, [command, args or {}])
        self.page.wait_for_function("() => window.testRun.done", timeout=seconds * 1000)
        if error := self.page.evaluate("() => window.testRun.error"):
            raise AssertionError(f"{command} failed: {error}")

    def run_all(self, seconds: float = 300) -> None:
        """Runs all cells, waits until the kernel is idle, and fails if a cell raised.

        A job that a cell leaves to a background thread goes on after this returns; wait for what it shows.
        """
        self.execute("notebook:run-all-cells", seconds=seconds)
        self.wait_idle(seconds)
        if raised := self.raised():
            raise AssertionError("\n".join(raised))

    def outputs(self) -> list[list[dict[str, Any]]]:
        """Returns each cell's outputs in notebook format; none for cells that hold no code."""
        cells = self.page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells")
        return [cell.get("outputs", []) for cell in cells]

    def raised(self) -> list[str]:
        """Returns `cell 3: ValueError: what it said` for each exception among the outputs."""
        return [
            f"cell {index}: {output['ename']}: {output['evalue']}"
            for index, outputs in enumerate(self.outputs())
            for output in outputs
            if output["output_type"] == "error"
        ]

    def cell(self, index: int) -> Locator:
        """Returns the cell with that index, text cells counted, scrolled into view."""
        cell = self.page.locator(".jp-NotebookPanel:visible .jp-Notebook .jp-Cell").nth(index)
        cell.scroll_into_view_if_needed()
        return cell

    def screenshot(self, name: str, of: Locator | None = None) -> Path:
        """Keeps a PNG of the page, or of one element, as `tests/artifacts/browser/<name>.png`."""
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        path = ARTIFACTS / f"{name}.png"
        (of or self.page).screenshot(path=path)
        return path

    def left_the_machine(self) -> list[str]:
        """Returns the requests so far that went to another machine than this."""
        parts = [(url, urlsplit(url)) for url in self.requests]
        return [
            url for url, part in parts if part.scheme in NETWORK_SCHEMES and part.hostname not in LOCAL_HOSTS
        ]

    def assert_quiet(self) -> None:
        """Fails if there was an error on the console or a request left the machine."""
        assert not self.console_errors, "errors on the console:\n" + "\n".join(self.console_errors)
        assert not self.left_the_machine(), "requests that left the machine:\n" + "\n".join(
            self.left_the_machine()
        )
