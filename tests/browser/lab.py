"""A real JupyterLab server with nothing of the user's in it, for tests."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
QUIET = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
PYTHON_KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
# Straight to the server, whatever proxy the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab.

    Attributes:
        url: where it listens, without a trailing slash.
        token: what every request must carry.
        root: the folder it serves.
        config: its JUPYTER_CONFIG_DIR.
        log: the file with its output and that of its kernels.
    """

    url: str
    token: str
    root: Path
    config: Path
    log: Path

    def add(self, notebook: Path | Sequence[str]) -> str:
        """Puts a notebook into a folder of its own under `root`.

        Args:
            notebook: a file to copy, or the sources of the code cells of a new one.

        Returns:
            Its path relative to `root`.
        """
        folder = self.root / secrets.token_hex(4)
        folder.mkdir()
        if isinstance(notebook, Path):
            return str(Path(shutil.copy(notebook, folder)).relative_to(self.root))
        cells = [nbformat.v4.new_code_cell(source) for source in notebook]
        path = folder / "test.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": PYTHON_KERNEL}), path)
        return str(path.relative_to(self.root))

    def use(self, theme: str, settings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Writes the settings overrides that pages opened from now on start with.

        Args:
            theme: a key of `THEMES`.
            settings: more overrides, by plugin.
        """
        themed = {"@jupyterlab/apputils-extension:themes": {"theme": THEMES[theme]}}
        overrides = self.config / "labconfig" / "default_setting_overrides.json"
        overrides.parent.mkdir(exist_ok=True)
        overrides.write_text(json.dumps({**QUIET, **themed, **(settings or {})}), encoding="utf-8")

    def address(self, path: str) -> str:
        """Returns the URL that opens `path` in a workspace of its own."""
        return f"{self.url}/lab/workspaces/{secrets.token_hex(4)}/tree/{path}?token={self.token}"

    def stop_kernels(self) -> None:
        """Stops every kernel, so that one test's model does not slow the next test."""
        for kernel in self.ask("GET", "kernels"):
            self.ask("DELETE", f"kernels/{kernel['id']}")

    def ask(self, method: str, path: str) -> Any:
        """Sends one request to the server's REST API and returns the JSON of its answer."""
        headers = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.url}/api/{path}", method=method, headers=headers)
        with DIRECT.open(request, timeout=30) as answer:
            return json.loads(answer.read() or "null")


@contextmanager
def serve(home: Path) -> Iterator[Lab]:
    """Runs JupyterLab with this interpreter while the block lasts.

    Its kernels use this interpreter too; settings, workspaces, runtime files and history live under
    `home`; it looks for no news, no updates and no extensions.

    Args:
        home: an empty folder.
    """
    folders = {
        name: home / name
        for name in ("root", "config", "data", "runtime", "settings", "workspaces", "ipython")
    }
    for folder in folders.values():
        folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lab = Lab(
        url=f"http://127.0.0.1:{port}",
        token=secrets.token_hex(16),
        root=folders["root"],
        config=folders["config"],
        log=home / "jupyterlab.log",
    )
    with lab.log.open("wb") as log:
        process = subprocess.Popen(
            command(lab, port),
            env=os.environ | environment(folders),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        try:
            wait_until_up(lab, process)
            yield lab
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def command(lab: Lab, port: int) -> list[str]:
    """Returns the command line of the server."""
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "ServerApp.root_dir": lab.root,
        "IdentityProvider.token": lab.token,
        "LabApp.expose_app_in_browser": True,
        "LabApp.extension_manager": "readonly",
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.news_url": None,
    }
    return [sys.executable, "-m", "jupyterlab", *(f"--{name}={value}" for name, value in options.items())]


def environment(folders: Mapping[str, Path]) -> dict[str, str]:
    """Returns the variables that keep the server away from the user's own Jupyter."""
    return {
        "JUPYTER_CONFIG_DIR": str(folders["config"]),
        "JUPYTER_DATA_DIR": str(folders["data"]),
        "JUPYTER_RUNTIME_DIR": str(folders["runtime"]),
        "JUPYTERLAB_SETTINGS_DIR": str(folders["settings"]),
        "JUPYTERLAB_WORKSPACES_DIR": str(folders["workspaces"]),
        "IPYTHONDIR": str(folders["ipython"]),
        # The interpreter's own kernel and extensions come before any that the user has installed.
        "JUPYTER_PREFER_ENV_PATH": "1",
        # Warnings are errors in the tests, not in what they start.
        "PYTHONWARNINGS": "default",
    }


def wait_until_up(lab: Lab, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    """Returns once the server answers; raises with its log if it dies or takes too long."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            lab.ask("GET", "status")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"JupyterLab did not come up:\n{lab.log.read_text(errors='replace')[-4000:]}")
