"""`Coroutine`: a run that waits where it is told to, while the code that started it goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

import greenlet
import torch

from workbench.errors import TraceError
from workbench.tracing.ambient import Ambient, other_noise


class Coroutine:
    """A function that can wait anywhere inside, also below code that knows nothing of it.

    It runs in the thread of whoever lets it go on. Each side has torch's state (grad mode, autocast, mode
    stacks) as it left it.

    Args:
        body: the function.
        own_noise: whether torch's own random numbers are each side's own too.
        hands_over: whether the body has those that the outside would have had: the outside has others while
            the body is under way, and at its end goes on from where the body left them.

    Attributes:
        ended: whether it has come to its end, or been ended.
    """

    def __init__(self, body: Callable[[], Any], *, own_noise: bool = False, hands_over: bool = False) -> None:
        self.ended = False
        self._own_noise = own_noise
        self._hands_over = hands_over
        self._body = body
        self._thread = threading.current_thread()
        self._greenlet: greenlet.greenlet | None = None
        self._inside: Ambient | None = None

    @property
    def begun(self) -> bool:
        """Whether `begin` was called."""
        return self._greenlet is not None

    def inside(self) -> bool:
        """Whether the code that asks is the body's."""
        return greenlet.getcurrent() is self._greenlet

    def begin(self) -> None:
        """Make it ready to go, with the torch state and the context variables of now."""
        self._thread = threading.current_thread()
        self._greenlet = greenlet.greenlet(self._run)
        # A greenlet starts without context variables; what the body prints must find the cell's output.
        self._greenlet.gr_context = copy_context()
        self._inside = self._now()
        if self._hands_over:
            other_noise()

    def check_thread(self) -> None:
        """Refuse another thread than the one it began in.

        Raises:
            TraceError: both threads are named.
        """
        if (here := threading.current_thread()) is not self._thread:
            raise TraceError(
                f"This run was opened in the thread {self._thread.name!r} and is used in {here.name!r}. "
                "Read, stop and close it (or the generator its block stands in) in the thread that opened it."
            )

    def wait(self) -> None:
        """In the body: hand over to the outside until it lets the body go on."""
        self._inside = self._now()
        assert self._greenlet is not None
        assert self._greenlet.parent is not None
        self._greenlet.parent.switch()

    def resume(self) -> None:
        """Outside: let the body go on until it waits or ends; what it raises is raised here."""
        coroutine = self._greenlet
        assert coroutine is not None
        try:
            self._cross(coroutine, coroutine.switch)
        finally:
            self.ended = coroutine.dead

    def end(self) -> None:
        """Outside: make the body unwind from where it waits, if it waits."""
        coroutine = self._greenlet
        try:
            if coroutine is not None and not coroutine.dead and coroutine:
                self._cross(coroutine, partial(coroutine.throw, greenlet.GreenletExit))
        finally:
            self.ended = True
            left, self._inside = self._inside, None
            if self._hands_over and left is not None and left.noise is not None:
                torch.set_rng_state(left.noise)

    def _run(self) -> Any:
        try:
            return self._body()
        finally:
            self._inside = self._now()

    def _now(self) -> Ambient:
        return Ambient(noise=torch.get_rng_state() if self._own_noise else None)

    def _cross(self, coroutine: greenlet.greenlet, into: Callable[[], Any]) -> None:
        """Go into the body with its torch state, and come back with the outside's."""
        self.check_thread()
        coroutine.parent = greenlet.getcurrent()
        outside, left, restored = self._now(), None, False
        try:
            try:
                if self._inside is not None:
                    self._inside.restore(outside)
                into()
                left = self._inside
            finally:
                outside.restore(left)
                restored = True
        finally:
            # An interrupt may have come in the middle of the first.
            if not restored:
                outside.restore()
