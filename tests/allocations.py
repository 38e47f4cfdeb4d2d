"""What a call allocates: each allocation is counted, so that it comes to the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def peak(call: Callable[[], Any]) -> int:
    """Return the most bytes that a call had allocated at once, of what was allocated in it."""
    import memray  # there is none for Windows

    with TemporaryDirectory() as folder:
        file = Path(folder) / "allocations"
        with memray.Tracker(file):
            call()
        return memray.FileReader(file).metadata.peak_memory
