"""Tests that need packages which lie beside the rest, run in a process of their own that finds them.

Where torchao or peft is found, every import of diffusers is slower and has much to say; so `make test` puts
them into a folder that only these processes look into.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BESIDE = Path(sys.prefix) / "beside"

needs_beside = pytest.mark.skipif(
    not BESIDE.exists(), reason="the packages that `make test` puts beside the rest are not installed"
)


def run_beside(*arguments: str) -> str:
    """Run pytest with those packages; every test must pass. Returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(BESIDE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
    return done.stdout
