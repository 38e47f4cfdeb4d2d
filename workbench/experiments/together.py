"""Forks of several runs computed as the rows of one, each with its own changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from workbench.errors import InputError
from workbench.interventions.attention import AttentionEdit
from workbench.interventions.control import RandomDirection
from workbench.interventions.intervention import Intervention
from workbench.models import arguments as checks
from workbench.models.model import DiffusionModel
from workbench.tracing.record import Record
from workbench.tracing.rows import joined, separate
from workbench.tracing.session import Listener

ROWS = 16
"""About how many runs go together: more cost memory and, on a processor, save little."""

_CLOSE = 1e-4
"""How far rows may be from runs of their own, of the largest latent; rounding alone is a hundredth of it."""

_LOOK_BACK = 3
"""Steps from the end in which rows are compared with a run: noise that is drawn shows in any but the last."""

_ROOM: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How many rows a model had memory for, of those that had not for more."""

Item = TypeVar("Item")


def fork_rows(
    targets: Sequence[Record],
    changes: Sequence[Sequence[Intervention]],
    step: int,
    *,
    pictures: bool = True,
    listener: Listener | None = None,
) -> list[Record]:
    """Fork runs of one sample each at one step, as the rows of one run.

    A single one is a fork of its own, exact to the byte. Of several each is its own fork but for rounding
    (within 1e-5 of the largest latent, in float32), and cannot be run again from. Where memory does not do
    for all, the halves are run one after the other.

    Args:
        targets: the runs, alike in all but seed and prompt; the same may stand several times.
        changes: what is changed in each, acting from ``step`` on.
        step: the first step that is computed.
        pictures: False leaves the latents as they are, where the pipeline can: there is no picture then.
        listener: told how the run goes on.

    Returns:
        A record for each target.

    Raises:
        InputError: the runs cannot go together, or a change names samples itself.
        torch.OutOfMemoryError: memory does not do for one alone.
    """
    told: dict[str, Any] = {"pictures": pictures, "listener": listener}
    model = targets[0].model
    if len(targets) <= _ROOM.get(model, len(targets)):
        try:
            return _fork_rows(targets, changes, step, **told)
        except torch.OutOfMemoryError:
            if len(targets) == 1:
                raise
            _ROOM[model] = len(targets) // 2
    # Only out here has the error let go of what the run held.
    half = len(targets) // 2
    parts = (slice(half), slice(half, None))
    return [each for part in parts for each in fork_rows(targets[part], changes[part], step, **told)]


def _fork_rows(
    targets: Sequence[Record],
    changes: Sequence[Sequence[Intervention]],
    step: int,
    *,
    pictures: bool,
    listener: Listener | None,
) -> list[Record]:
    model = targets[0].model
    bare = not pictures and isinstance(model, DiffusionModel) and checks.takes(model.pipeline, "output_type")
    asked = {"capture": (), "listener": listener, **({"output_type": "latent"} if bare else {})}
    if len(targets) == 1:
        return [targets[0].fork(step, interventions=list(changes[0]), **asked)]
    edits = [of_sample(edit, row) for row, each in enumerate(changes) for edit in each]
    return separate(joined(targets).fork(step, interventions=edits, **asked))


def of_sample(edit: Intervention, sample: int) -> Intervention:
    """Return an intervention as it acts on one sample of several.

    Raises:
        InputError: it names samples itself, or watches the run by means of its own.
    """
    if edit.samples is not None or not (edit.sites or isinstance(edit, AttentionEdit)):
        raise InputError(f"{type(edit).__name__} at {edit.site} cannot be one row's of several.")
    if isinstance(edit, RandomDirection):
        return replace(edit, patch=replace(edit.patch, samples=sample), samples=sample)
    return replace(edit, samples=sample)


def goes_together(target: Record) -> bool:
    """Whether rows of one run become what runs of their own do, tried on the last steps of a run.

    They do not where a scheduler draws noise from one source for all rows, in loops written by hand, and
    where a pipeline cannot have several samples.
    """
    step = max(0, target.ledger.steps - _LOOK_BACK)
    own = list(target.spec.interventions)
    try:
        rows = _fork_rows([target, target], [own, own], step, pictures=False, listener=None)
    except (InputError, TypeError, ValueError, RuntimeError):
        # What a pipeline makes of arguments side by side is its own affair; runs of their own always go.
        return False
    whole = target.latents
    return all(float((row.latents - whole).abs().max()) <= _CLOSE * float(whole.abs().max()) for row in rows)


def evenly(items: Sequence[Item], about: int) -> Iterator[list[Item]]:
    """Give items in stretches of about as many as said, and as long as each other, to one.

    A call costs much before its first row, so that two stretches of nine are better than three of six.
    """
    stretches = max(1, int(len(items) / about + 0.5)) if items else 0
    for index in range(stretches):
        first, last = (len(items) * place // stretches for place in (index, index + 1))
        yield list(items[first:last])
