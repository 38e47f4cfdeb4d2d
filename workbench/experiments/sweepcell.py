"""The cell of a sweep's point: which experiment some values of the axes make of another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from workbench.errors import InputError, UnknownNameError, nearest
from workbench.experiments.change import Change
from workbench.experiments.experiment import Experiment
from workbench.experiments.site_changes import PatchSpec
from workbench.experiments.spec import wrong
from workbench.experiments.windows import window as window_of

AXES = ("site", "step", "window", "branch", "heads", "words", "seed")
"""The axes that a sweep of patches knows by name."""

Point = Mapping[str, Any]


def cell_of(experiment: Experiment, point: Point, *, window: str, branch: str) -> Experiment:
    """Return the experiment of a point, in the runs of that point.

    With a ``site`` it is a patch there beside what the experiment changes itself; without, the point says
    where and when the experiment's own patches act, or, if it has none, its other changes.

    Args:
        experiment: what all cells have in common.
        point: a value of each axis, ``seed`` among them.
        window: which steps a step stands for, where the point does not say.
        branch: which branch is patched at a ``site``, likewise.

    Raises:
        InputError: a value is none of its axis, or does not go with what the experiment changes.
        UnknownNameError: no such axis.
    """
    where = _where(experiment, point, window)
    changes: tuple[Any, ...] = experiment.interventions
    try:
        if "site" in point:
            sites = point["site"] if isinstance(point["site"], tuple) else (point["site"],)
            where = {"branch": branch, **where}
            changes = (*changes, *(PatchSpec(site=str(site), **where) for site in sites))
        elif where:
            moved = [isinstance(each, PatchSpec) for each in changes]
            if not any(moved):
                moved = [isinstance(each, Change) for each in changes]
            changes = tuple(
                _moved(each, where) if mine else each for each, mine in zip(changes, moved, strict=True)
            )
        if not changes:
            raise InputError("Nothing is patched: give an axis 'site', or an experiment with patches.")
        seed, apart = point["seed"], experiment.source_seed
        apart = None if apart is None else seed + apart - experiment.seed
        update = {**_texts(experiment, point), "seed": seed, "source_seed": apart, "interventions": changes}
        return Experiment.model_validate(experiment.model_copy(update=update).model_dump())
    except ValidationError as error:
        raise InputError(
            f"The cell of {dict(point)} is no experiment: {wrong(error)}. What the experiment changes itself "
            "is in every cell; experiment.plain() is without it."
        ) from None


def check_axes(axes: Collection[str], *, window: str, branch: str, own: bool) -> None:
    """Refuse axes and settings that would change no cell.

    Args:
        axes: the names.
        window: as the sweep was given it.
        branch: likewise.
        own: whether the experiment changes anything itself.

    Raises:
        InputError: with the axis and what it needs.
    """
    if "step" not in axes and ("window" in axes or window != "1"):
        raise InputError(
            "A window is of steps, and no axis names one: give an axis 'step', or leave the window out."
        )
    if "site" not in axes and branch != "cond" and own:
        raise InputError(
            f"branch={branch!r} is of patches at an axis 'site', and there is none: the experiment's own say "
            "their branch, and an axis 'branch' changes it."
        )


def step_of(step: Any, steps: int) -> int:
    """Return a step counted from 0.

    Raises:
        InputError: it is none of so many.
    """
    if not isinstance(step, int) or isinstance(step, bool) or not -steps <= step < steps:
        raise InputError(f"The runs have {steps} steps, counted from 0; {step!r} is none of them.")
    return step % steps


def _where(experiment: Experiment, point: Point, window: str) -> dict[str, Any]:
    """Return what a point says of where and when is changed."""
    steps = experiment.num_inference_steps
    assert steps is not None
    found: dict[str, Any] = {}
    if "step" in point:
        found["steps"] = window_of(point.get("window", window), step_of(point["step"], steps), steps)
    if "branch" in point:
        found["branch"] = point["branch"]
    if (heads := point.get("heads")) is not None:
        found["heads"] = heads if isinstance(heads, tuple) else (heads,)
    if (asked := point.get("words")) is not None:
        found |= _words(asked)
    return found


def _moved(change: Change, where: Mapping[str, Any]) -> Change:
    """Return a change of the experiment's own where a point says."""
    known = type(change).model_fields
    if "words" in where:
        if not ("tokens" in known and "words" in known):
            raise InputError(
                f"The axis words says which places are changed, and {change.kind} chooses none by words. "
                "Give cell=, a function that makes each point's experiment."
            )
        if where["from_words"] is not None and "from_words" not in known:
            raise InputError(
                f"The axis words takes {' + '.join(where['from_words'])} from the source, and {change.kind} "
                "takes nothing from it. Name words of the target alone."
            )
        if any(getattr(change, name, None) is not None for name in ("tokens", "from_tokens")):
            raise InputError(
                "The axis words and the tokens of the experiment's own change both choose places: leave "
                "one of them out."
            )
    told = {name: value for name, value in where.items() if name in known}
    return change.model_copy(update=told)


def _texts(experiment: Experiment, point: Point) -> dict[str, str | None]:
    """Return both prompts with the values of the axes that stand in them."""
    texts = {"source": experiment.source, "target": experiment.target}
    for name, value in point.items():
        slot = "{" + name + "}"
        filled = any(slot in (text or "") for text in texts.values())
        if name in AXES:
            if filled:
                raise InputError(f"The axis {name} does not go into prompts: call what is {slot} otherwise.")
            continue
        if not filled:
            raise UnknownNameError(
                f"No axis {name!r}.{nearest(name, AXES)} Or let the prompts have {slot} in them, or give "
                "cell=, a function that makes each point's experiment."
            )
        texts = {key: text and text.replace(slot, str(value)) for key, text in texts.items()}
    return texts


def _words(asked: str | tuple[str, ...]) -> dict[str, Any]:
    """Return which words of the target are patched, from which of the source."""
    ways = []
    for each in (asked,) if isinstance(asked, str) else asked:
        way = [word.strip() for word in str(each).split("->")]
        if len(way) > 2 or not all(way):
            raise InputError(
                f"words={each!r}: a word of both prompts, or one of the source's and one of the target's, "
                "'red -> blue'."
            )
        ways.append(way)
    words, sources = (tuple(way[place] for way in ways) for place in (-1, 0))
    return {"words": words, "from_words": None if words == sources else sources}
