"""A program's time and memory, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time

# Not getrusage: its peak is the parent's where the parent was larger.
_PEAK = """
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def fresh(program: str) -> tuple[float, int]:
    """Run a program in a process of its own; return its seconds and its peak memory in KiB."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program + _PEAK], capture_output=True, text=True, check=True)
    return time.perf_counter() - began, int(done.stdout.split()[-1])


def inside(before: str, program: str) -> tuple[float, int]:
    """Return a program's own seconds and KiB above the peak of what ran before it in the same new process."""
    peak = 'int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])'
    text = f"{before}\nimport time\npeak, began = {peak}, time.perf_counter()\n{program}\n"
    text += f"print(time.perf_counter() - began, {peak} - peak)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    seconds, above = done.stdout.split()[-2:]
    return float(seconds), int(above)
