"""One thread that owns a model and does one job at a time."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
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
        self._error: BaseException | None = None
        self._calls: list[Callable[[Job], None]] = []

    def stop(self) -> None:
        """Ask the job to end before its next denoiser call."""
        self._stop.set()
        if not self._future.cancelled() and self._future.cancel():
            self._tell()

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end."""
        return self._stop.is_set()

    @property
    def done(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._future.done()

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job and return what it returned, or raise what it raised.

        Raises:
            RunStopped: it was dropped before it began.
            TimeoutError: it has not ended in ``timeout`` seconds.
        """
        try:
            return self._future.result(timeout)
        except CancelledError:
            raise RunStopped(f"The {self.label} was dropped before it began.") from None

    def when_done(self, call: Callable[[Job], None]) -> None:
        """Call ``call(job)`` when the job ends, before whoever waits for it goes on.

        Ask before the job is submitted.
        """
        self._calls.append(call)

    def error(self) -> BaseException | None:
        """Return what the job raised, or None."""
        return self._error

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
        value = None
        try:
            value = self._work(self)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the result
            self._error = error
        try:
            self._tell()
        finally:
            if self._error is None:
                self._future.set_result(value)
            else:
                self._future.set_exception(self._error)

    def _tell(self) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            call(self)


class Worker:
    """A daemon thread that does one job at a time; urgent jobs go before patient ones."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: list[Job] = []
        self._running: Job | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether an urgent job is running or waiting."""
        with self._changed:
            return any(job.priority == URGENT and not job.done for job in self._jobs)

    def waiting(self, label: str) -> int:
        """Return how many jobs of a label wait."""
        with self._changed:
            return sum(1 for job in self._jobs if job is not self._running and job.label == label)

    def submit(self, job: Job) -> Job:
        """Put a job in the queue and return it; a closed worker drops it at once."""
        with self._changed:
            closed = self._closed
            if not closed:
                self._jobs.append(job)
                self._changed.notify()
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
                    self._thread.start()
                    atexit.register(self._leave_with_interpreter)
        if closed:
            job.stop()
        return job

    def stop(self) -> None:
        """Stop the job that runs and drop those that wait."""
        with self._changed:
            jobs = self._jobs
            self._jobs = [job for job in jobs if job is self._running]
        for job in jobs:
            job.stop()

    def close(self) -> None:
        """Stop everything and let the thread end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.stop()
        atexit.unregister(self._leave_with_interpreter)

    def _leave_with_interpreter(self) -> None:
        """End between two calls: a thread that is cut off inside a kernel takes the process down."""
        self.close()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            try:
                job.run()
            finally:
                with self._changed:
                    self._jobs.remove(job)
                    self._running = None
            # An idle worker must not keep the last run's tensors alive.
            del job

    def _next(self) -> Job | None:
        """Wait for a job and return it, the first of the most urgent; None when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            self._running = min(self._jobs, key=lambda job: job.priority, default=None)
            return self._running
