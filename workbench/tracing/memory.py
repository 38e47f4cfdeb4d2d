"""How much memory this process may still take."""

from __future__ import annotations

from pathlib import Path

import psutil

_CONTAINER = Path("/sys/fs/cgroup")


def free_memory(container: Path = _CONTAINER) -> int:
    """Return the bytes that are free: of the machine, or of the container if that has a limit.

    Args:
        container: where Linux tells of a container's memory (cgroup v2).
    """
    free = int(psutil.virtual_memory().available)
    try:
        most = (container / "memory.max").read_text().strip()
        used = int((container / "memory.current").read_text())
        # Pages of files that were read make way when memory is short.
        told = dict(line.split() for line in (container / "memory.stat").read_text().splitlines())
        return free if most == "max" else min(free, max(int(most) - used + int(told["inactive_file"]), 0))
    except (OSError, ValueError, KeyError):
        return free
