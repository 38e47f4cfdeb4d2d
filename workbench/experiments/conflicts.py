"""Which changes of one run undo each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from workbench.experiments.change import Change
from workbench.experiments.changes import TurnSpec

Choices = tuple[frozenset[Hashable] | None, ...]
"""What a change chooses in each way (steps, branch, heads, …); None is all."""


def check_order(changes: Sequence[Any], steps: int | None = None) -> None:
    """Refuse changes of which one would undo another.

    Args:
        changes: in their order.
        steps: how many the runs have, if that is known.

    Raises:
        ValueError: with both.
    """
    placed: dict[tuple[str, ...], _Place] = defaultdict(_Place)
    for number, each in enumerate(changes):
        if not isinstance(each, Change) or not each.ground:
            continue
        place, choices = placed[each.ground], _sets(each, steps)
        undone = place.undone(each, choices)
        if undone is not None:
            before, other = undone
            did = "puts something new" if before.place and before.everywhere else "changes something"
            raise ValueError(
                f"{each.kind} (number {number}) puts something new where {before.kind} (number {other}) "
                f"{did} before, of which nothing would be left: give them other steps, branches, heads or "
                "tokens, or a strength"
            )
        place.add(each, number, choices)
    turns = [(number, each) for number, each in enumerate(changes) if isinstance(each, TurnSpec)]
    for (_, before_it), (number, turn) in pairwise(turns):
        if turn.step <= before_it.step:
            raise ValueError(
                f"turns go forward: number {number}, at step {turn.step}, comes after that at step "
                f"{before_it.step}"
            )


class _Place:
    """The changes of one place so far, found by what they choose.

    Sets of changes are the bits of a number: the pairs of a thousand changes would be too many to compare.
    """

    def __init__(self) -> None:
        self._changes: list[tuple[Change, int, Choices]] = []
        self._all: dict[int, int] = defaultdict(int)
        self._having: dict[int, dict[Hashable, int]] = defaultdict(dict)

    def add(self, change: Change, number: int, choices: Choices) -> None:
        bit = 1 << len(self._changes)
        self._changes.append((change, number, choices))
        for way, chosen in enumerate(choices):
            if chosen is None:
                self._all[way] |= bit
            having = self._having[way]
            for each in chosen or ():
                having[each] = having.get(each, 0) | bit

    def undone(self, change: Change, choices: Choices) -> tuple[Change, int] | None:
        """Return the first change that one more leaves nothing of; None if there is none."""
        if not (change.place and change.everywhere):
            return None
        for before, number, chosen in self._meeting(choices):
            if before.place and before.everywhere:
                return before, number
            if all(_within(one, two) for one, two in zip(chosen, choices, strict=True)):
                return before, number
        return None

    def _meeting(self, choices: Choices) -> Iterator[tuple[Change, int, Choices]]:
        met = (1 << len(self._changes)) - 1
        for way, chosen in enumerate(choices):
            if chosen is not None:
                here, having = self._all[way], self._having[way]
                for each in chosen:
                    here |= having.get(each, 0)
                met &= here
        while met:
            first = met & -met
            yield self._changes[first.bit_length() - 1]
            met ^= first


def _sets(change: Change, steps: int | None) -> Choices:
    found = tuple(None if chosen is None else frozenset(chosen) for chosen in change.choices(steps))
    return (None if steps is not None and len(found[0] or ()) == steps else found[0], *found[1:])


def _within(one: frozenset[Hashable] | None, two: frozenset[Hashable] | None) -> bool:
    return two is None or (one is not None and len(one) <= len(two) and one <= two)
