"""One thread that owns a model and does one job at a time."""

from __future__ import annotations

import atexit
import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from workbench.errors import RunStopped
from workbench.tracing.clock import Tick
from workbench.tracing.ledger import Row

URGENT, PATIENT = 0, 1
"""What a person waits for, and what fills the time in between."""


class Job:
    """A piece of work for the worker; also the listener of the runs it makes.

    Args:
        label: what it is, for the person who waits.
        work: called with the job, in the worker's thread.
        watch: called, in the worker's thread, with the job, the tick and the latents after it.
        priority: `URGENT` or `PATIENT`.
    """

    def __init__(
        self,
        label: str,
        work: Callable[[Job], Any],
        watch: Callable[[Job, Tick, torch.Tensor], None] | None = None,
        priority: int = URGENT,
    ) -> None:
        self.label = label
        self._work = work
        self._watch = watch
        self.priority = priority
        self._stop = threading.Event()
        self._future: Future[Any] = Future()

    def stop(self) -> None:
        """Ask the job to end before its next denoiser call."""
        self._stop.set()
        self._future.cancel()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""
        return self._stop.is_set()

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job and return what it returned, or raise what it raised."""
        return self._future.result(timeout)

    def when_done(self, call: Callable[[Job], None]) -> None:
        """Call ``call(job)`` once the job has ended."""
        self._future.add_done_callback(lambda _: call(self))

    def error(self) -> BaseException | None:
        """Return what the ended job raised, or None."""
        return None if self._future.cancelled() else self._future.exception()

    def started(self, row: Row) -> None:
        """Raise at the start of a denoiser call if asked to end (see `Listener`)."""
        if self.stopping:
            raise RunStopped(f"Stopped in step {row.step} of the {self.label}.")

    def ticked(self, tick: Tick, latents: torch.Tensor) -> None:
        """Pass a tick on to whoever watches (see `Listener`)."""
        if self._watch is not None:
            self._watch(self, tick, latents)

    def run(self) -> None:
        """Do the work; called by the worker."""
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            self._future.set_result(self._work(self))
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the result
            self._future.set_exception(error)


class Worker:
    """A daemon thread with a queue; urgent jobs go before patient ones."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.PriorityQueue[tuple[int, int, Job | None]] = queue.PriorityQueue()
        self._order = itertools.count()
        self._current: Job | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """Whether an urgent job is running or waiting."""
        running = self._current is not None and self._current.priority == URGENT
        return running or self.waiting(URGENT) > 0

    def waiting(self, priority: int) -> int:
        """Return how many jobs of a priority wait."""
        with self._queue.mutex:
            return sum(1 for waiting, _, job in self._queue.queue if job is not None and waiting == priority)

    def submit(self, job: Job) -> Job:
        """Put a job in the queue and return it."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                self._thread.start()
                atexit.register(self._leave_with_interpreter)
        self._queue.put((job.priority, next(self._order), job))
        return job

    def stop(self) -> None:
        """Stop the job that runs and drop those that wait."""
        while True:
            try:
                _, _, waiting = self._queue.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting.stop()
        if self._current is not None:
            self._current.stop()

    def close(self) -> None:
        """Stop everything and let the thread end."""
        self.stop()
        self._queue.put((PATIENT, next(self._order), None))
        atexit.unregister(self._leave_with_interpreter)

    def _leave_with_interpreter(self) -> None:
        """End between two calls: a thread that is cut off inside a kernel takes the process down."""
        self.close()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _work(self) -> None:
        while True:
            _, _, job = self._queue.get()
            if job is None:
                return
            self._current = job
            try:
                job.run()
            finally:
                self._current = None
            # An idle worker must not keep the last run's tensors alive.
            del job
