"""Every error the workbench raises on purpose.

::

    WorkbenchError
    ├── UnknownNameError      a name nobody knows: model, site, step, port, word; lists the nearest
    ├── InputError            a value that does not fit: empty prompt, wrong type, wrong range
    ├── LoadError             a folder, Hub id or file that cannot be opened as a pipeline
    ├── StoreError            a folder that cannot be read as a record or a data set of ours, or written
    ├── TraceError            the run did not pass where it was asked to
    │   ├── OutOfOrderError   the value had already gone by, or was never reached
    │   ├── ShapeError        a replacement whose shape or dtype does not fit; both are printed
    │   └── NotFiniteError    a change that makes infinities of finite values, there or later in the latents
    ├── GuardError            a setting of the model under which tracing would be wrong
    ├── BusyError             a second run on a model that is already running
    ├── RankError             a run of several ranks that ended because another rank's failed
    └── RunStopped            the user pressed Stop; carries what was seen

Each message says what was given, what would fit and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class WorkbenchError(Exception):
    """Base of every error raised on purpose."""


class UnknownNameError(WorkbenchError, AttributeError):
    """A name that does not exist; the message lists the nearest ones that do."""


class InputError(WorkbenchError, ValueError):
    """A value that cannot be used as given."""


class LoadError(WorkbenchError):
    """Something that cannot be opened as a diffusion pipeline."""


class StoreError(WorkbenchError):
    """A folder that cannot be read as a record or a data set of activations, or cannot be written."""


class TraceError(WorkbenchError):
    """A trace that could not give what it was asked for."""


class OutOfOrderError(TraceError):
    """A value asked for after it had passed, or that the run never reached.

    Attributes:
        record: the run, where it came to its end all the same; else None.
    """

    record: Any = None


class ShapeError(TraceError, ValueError):
    """A replacement whose shape, dtype or structure does not fit the value it replaces."""


class NotFiniteError(TraceError, ValueError):
    """A change of a run that makes infinities, or what is no number, of finite values."""


class GuardError(WorkbenchError):
    """A setting of the model that makes tracing wrong; the message says what to switch off."""


class BusyError(WorkbenchError):
    """A second run was asked of a model that is already running one."""


class RankError(WorkbenchError):
    """A run of several ranks ended because that of another one failed; the message has its error."""


class RunStopped(WorkbenchError):
    """The run was stopped on request; ``record`` has what was seen until then."""

    record: Any = None


def nearest(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Say which known names are nearest to ``name``.

    Args:
        name: what was given.
        known: every name that would have fitted.
        most: how many to list.

    Returns:
        ``" Did you mean 'a', 'b'?"``, or the first few known names if none is near, or ``""``.
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=most, cutoff=0.5)
    if not close:
        tail = name.rsplit(".", 1)[-1]
        close = [known_name for known_name in names if tail and tail in known_name][:most]
    if close:
        return " Did you mean " + ", ".join(repr(item) for item in close) + "?"
    if names:
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return " There are: " + ", ".join(repr(item) for item in names[:8]) + more + "."
    return ""
