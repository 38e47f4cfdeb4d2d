"""Runs that ranks make together: where one rank fails, the others do not wait for it."""

from __future__ import annotations

import datetime
import math
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from workbench.errors import RankError

_LOOK, _GRACE = 1.0, 5.0
_FAILED, _SAID, _PARTED = "workbench/failed/{}", "workbench/said/{}", "workbench/parted"
_NEVER_SENT = 77


class Lockstep:
    """One run of every rank, as a context.

    Each rank counts its failed runs in the store by which the ranks found each other. While the counts
    differ, no rank begins another run, and those that wait in a collective operation wait in vain: after
    some seconds all close their connections, so that it raises. Ranks that fail alike stay together.

    Args:
        meshes: the ranks that exchange parameters in the run.

    Raises:
        RankError: entered after the ranks parted; or left, if this run ended because they did.
    """

    def __init__(self, meshes: Iterable[DeviceMesh]) -> None:
        world = dist.group.WORLD
        assert world is not None
        self._groups = [world, *(group for mesh in meshes for group in mesh.get_all_groups())]
        store: Any = world.get_group_store()
        # Of its own, since the other may be waiting for something.
        self._store = store.clone()
        self._done, self._thread = threading.Event(), threading.Thread(target=self._look, daemon=True)
        self._before: BaseException | None = None

    def __enter__(self) -> Self:
        self._before = sys.exception()
        last = time.monotonic() + _GRACE
        while not self._parted(last):
            if not self._apart():
                self._thread.start()
                return self
            time.sleep(0.05)
        self._part()
        raise self._error()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        # Inside a handler of another error, that one is the current one also where this run is well.
        if error is None or error is self._before or isinstance(error, RankError):
            return
        if self._thread.is_alive():
            self._thread.join()
        if self._store.check([_PARTED]):
            raise self._error() from error
        rank = dist.get_rank()
        self._store.set(_SAID.format(rank), f"{type(error).__name__}: {error}"[:500])
        self._store.add(_FAILED.format(rank), 1)

    def _look(self) -> None:
        last = math.inf
        while not self._done.wait(_LOOK):
            try:
                last = min(last, time.monotonic() + _GRACE) if self._apart() else math.inf
                if not self._parted(last):
                    continue
            except (RuntimeError, ValueError):
                return  # The store is gone, and with it the process that started the ranks.
            self._part()
            return

    def _apart(self) -> bool:
        return len(set(self._failed())) > 1

    def _failed(self) -> list[int]:
        return [self._store.add(_FAILED.format(rank), 0) for rank in range(dist.get_world_size())]

    def _parted(self, last: float) -> bool:
        """Whether the ranks have parted; from a time on, they do."""
        if time.monotonic() > last:
            failed = self._failed()
            self._store.set(_PARTED, str(failed.index(max(failed))))
        return bool(self._store.check([_PARTED]))

    def _part(self) -> None:
        for group in self._groups:
            group.abort()
            if group.size() > 1 and dist.get_backend(group) == "gloo":
                # Gloo cannot abort, but it closes all connections of a group where one operation is late.
                with suppress(RuntimeError):
                    late = group.recv([torch.empty(1)], (group.rank() + 1) % group.size(), _NEVER_SENT)
                    late.wait(datetime.timedelta(milliseconds=1))

    def _error(self) -> RankError:
        rank = int(self._store.get(_PARTED))
        said = self._store.get(_SAID.format(rank)).decode()
        return RankError(
            f"Rank {rank} failed in a run that all ranks make together ({said}), so the ranks have parted. "
            "Start them anew."
        )
