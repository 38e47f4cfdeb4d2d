"""Kills a process in the middle of its file operations, at each of them in turn."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator

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
        process = multiprocessing.get_context("fork").Process(target=_until, args=(work, operation))
        process.start()
        process.join()
        killed = process.exitcode == -signal.SIGKILL
        assert killed or process.exitcode == 0, process.exitcode
        yield killed
        operation += 1


def _until(work: Callable[[], None], operation: int) -> None:
    count = 0

    def die(event: str, _: object) -> None:
        nonlocal count
        if event in FILE_OPERATIONS:
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    # The parent's threads are not in this process, and OpenMP would wait for them.
    torch.set_num_threads(1)
    sys.addaudithook(die)
    work()
    os._exit(0)
