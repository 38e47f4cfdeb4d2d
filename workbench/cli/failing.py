"""How a command says that a run failed, in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from workbench.errors import WorkbenchError


class FailedError(Exception):
    """What was asked was right, and its run failed: exit status 1."""


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Say in one line what a pipeline, or what it is made of, raised of its own.

    Args:
        what: what is done meanwhile, as a subject: ``"The run"``.

    Raises:
        FailedError: with the name of the error and its text.
    """
    try:
        yield
    except (WorkbenchError, FailedError):
        raise
    except Exception as error:
        raise FailedError(f"{what} ended with {type(error).__name__}: {error}") from error
