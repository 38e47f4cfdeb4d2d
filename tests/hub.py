"""A Hub of one repository on this machine, whose network can end halfway; and what a model meets there.

``python -m tests.hub REPOSITORY FOLDER`` serves a repository, calls the functions below in turn, each with a
cache of its own in the folder, and writes there what they found. It is a process of its own since the Hub's
client looks only once for the server's address.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import struct
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

NAME = "someone/tiny"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Serves a folder as the repository `NAME`.

    Attributes:
        cut: a file in the middle of which the connection breaks.
        asked: by file, how often it was asked for, and the token that came with it the last time.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.cut: str | None = None
        self.asked: dict[str, tuple[int, str | None]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{NAME}"):
            self._about(path)
        else:
            self._file(path.partition("/resolve/")[2].partition("/")[2])

    def _about(self, path: str) -> None:
        files = [file for file in sorted(self.server.folder.rglob("*")) if file.is_file()]
        named = {file.relative_to(self.server.folder).as_posix(): file for file in files}
        if "/tree/" in path:
            answer: Any = [
                {"type": "file", "oid": _tag(file), "size": file.stat().st_size, "path": name}
                for name, file in named.items()
            ]
        else:
            answer = {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in named]}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str) -> None:
        file = self.server.folder / name
        if not file.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            often, _ = self.server.asked.get(name, (0, None))
            self.server.asked[name] = often + 1, self.headers.get("Authorization")
        content, start = file.read_bytes(), 0
        headers = {"ETag": f'"{_tag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is not None:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) + 1 if last else len(content)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            content = content[start:end]
        cut = self.command == "GET" and name == self.server.cut
        self._answer(200 if wanted is None else 206, content, headers, cut=cut)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        """Break the connection as a network does: nothing more comes, not even an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def _tag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _fault(use: Any) -> dict[str, str]:
    """Return the kind and the words of the error that something ends with."""
    try:
        use()
    except Exception as error:  # noqa: BLE001 - which kind it is, the test looks at
        return {"kind": type(error).__name__, "said": str(error)}
    return {"kind": "", "said": ""}


def cut_off(hub: Hub, cache: Path) -> dict[str, Any]:
    """Lose the network in the middle of a file of weights, and have it again."""
    model = DiffusionModel(NAME, cache_dir=str(cache))
    hub.cut = "unet/diffusion_pytorch_model.safetensors"
    fault = _fault(model.dispatch)
    waiting = not model.dispatched and all(each.is_meta for each in model.components["unet"].parameters())
    hub.cut = None
    model.dispatch()
    return {**fault, "waiting": waiting, "latents": _latents(model)}


def cut_off_early(hub: Hub, cache: Path) -> dict[str, Any]:
    """Lose the network in the middle of a configuration."""
    hub.cut = "unet/config.json"
    fault = _fault(lambda: DiffusionModel(NAME, cache_dir=str(cache)))
    hub.cut = None
    return {**fault, "latents": _latents(DiffusionModel(NAME, cache_dir=str(cache)))}


def full(hub: Hub, cache: Path) -> dict[str, Any]:
    """Have no room for a file of weights, and then have it."""
    model = DiffusionModel(NAME, cache_dir=str(cache))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    fault = _fault(model.dispatch)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    waiting = not model.dispatched and all(each.is_meta for each in model.components["unet"].parameters())
    return {**fault, "waiting": waiting, "latents": _latents(model)}


def headers(hub: Hub, cache: Path) -> dict[str, Any]:
    """Look at the dtypes of weights that are not fetched."""
    model = DiffusionModel(NAME, cache_dir=str(cache), dtype="auto")
    told = {name: part["as_is"] for name, part in model.memory().items()}
    fetched = [str(file) for file in cache.rglob("*.safetensors")]
    model.dispatch()
    return {
        "told": told,
        "is": {name: part["as_is"] for name, part in model.memory().items()},
        "fetched": fetched,
    }


def again(hub: Hub, cache: Path) -> dict[str, Any]:
    """Fetch all with a token, then again from the cache, then once more by force."""
    times = []
    for options in ({"token": "hf_secret"}, {}, {"force_download": True}):
        DiffusionModel(NAME, cache_dir=str(cache), dispatch=True, **options)
        times.append(dict(hub.asked))
    return {"times": times}


def custom(hub: Hub, cache: Path) -> dict[str, Any]:
    """Open the repository as the pipeline whose code it brings."""
    options = {"cache_dir": str(cache), "custom_pipeline": NAME}
    fault = _fault(lambda: DiffusionModel(NAME, dispatch=True, **options))
    model = DiffusionModel(NAME, dispatch=True, trust_remote_code=True, **options)
    return {**fault, "class": model.automodel.__name__, "latents": _latents(model)}


def nobody(hub: Hub, cache: Path) -> dict[str, Any]:
    """Find no server at all, with a dispatched model and with one that waits for its weights."""
    hub.shutdown()
    hub.server_close()
    opened = partial(DiffusionModel, NAME, cache_dir=str(cache))
    return {**_fault(opened), "dispatched": _fault(partial(opened, dispatch=True))}


def _latents(model: Any) -> list[float]:
    latents = model.record("a red circle", seed=0, num_inference_steps=1, output_type="latent").latents
    return latents.flatten().tolist()


if __name__ == "__main__":
    hub = Hub(Path(sys.argv[1]))
    Thread(target=hub.serve_forever, daemon=True).start()
    os.environ |= {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
    from workbench.models.model import DiffusionModel

    found = {}
    for function in (again, custom, cut_off, cut_off_early, full, headers, nobody):
        found[function.__name__] = function(hub, Path(sys.argv[2]) / function.__name__)
    (Path(sys.argv[2]) / "found.json").write_text(json.dumps(found))
