"""Kills a process in the middle of its file operations, at each of them in turn or at one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from ctypes import c_int
from typing import Any

import torch

FILE_OPERATIONS = {
    "open",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.remove",
    "os.chmod",
    "os.scandir",
    "shutil.rmtree",
}


def killed_at_each_operation(work: Callable[[], None], prepare: Callable[[], None]) -> Iterator[bool]:
    """Run ``work`` in a process of its own that dies by SIGKILL at its first file operation, its second, …

    Args:
        work: what is to be interrupted.
        prepare: brings the files into their first state, before each run.

    Yields:
        After each run, whether it was killed; the last was not.
    """
    operation, killed = 0, True
    while killed:
        prepare()
        killed = not finishes(work, operation)[0]
        yield killed
        operation += 1


def finishes(work: Callable[[], None], operation: int | None = None) -> tuple[bool, int]:
    """Run ``work`` in a process of its own that dies by SIGKILL before one of its file operations.

    Args:
        work: what is to be interrupted.
        operation: which, counted from 0; None lets it come to its end.

    Returns:
        Whether it came to its end, and how many file operations it made until then.
    """
    context = multiprocessing.get_context("fork")
    count = context.Value(c_int, 0)
    process = context.Process(target=_until, args=(work, operation, count))
    process.start()
    process.join()
    killed = process.exitcode == -signal.SIGKILL
    assert killed or process.exitcode == 0, process.exitcode
    return not killed, count.value


def _until(work: Callable[[], None], operation: int | None, count: Any) -> None:
    def die(event: str, _: object) -> None:
        if event in FILE_OPERATIONS:
            if count.value == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count.value += 1

    # The parent's threads are not in this process, and OpenMP would wait for them.
    torch.set_num_threads(1)
    sys.addaudithook(die)
    work()
    os._exit(0)
