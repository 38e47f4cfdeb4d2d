"""How well an image shows what a prompt asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

from workbench.zoo.language import Asked, AskedThing
from workbench.zoo.reader import Found, Reading


@dataclass(frozen=True)
class Score:
    """Which of a prompt's words an image follows; ``None`` where the prompt does not say.

    Attributes:
        count: as many objects as asked for.
        colours: the colours are those asked for, whatever wears them.
        shapes: the shapes are those asked for, whatever their colour.
        bound: each asked (colour, shape) pair is there, and no other.
        sizes: every object whose size is asked for has it.
        ground: light or dark as asked.
        places: every object whose place is asked for stands there.
    """

    count: bool
    colours: bool
    shapes: bool
    bound: bool
    sizes: bool | None
    ground: bool | None
    places: bool | None

    @property
    def all_but_places(self) -> bool:
        """Whether every word is followed, leaving the places aside."""
        return all(
            value is not False
            for value in (self.count, self.colours, self.shapes, self.bound, self.sizes, self.ground)
        )

    @property
    def all_right(self) -> bool:
        """Whether every word is followed."""
        return self.all_but_places and self.places is not False


def score(asked: Asked, reading: Reading) -> Score:
    """Compare what was asked for with what is there.

    Args:
        asked: what ``parse`` made of the prompt.
        reading: what ``read`` made of the image.

    Returns:
        What is right; objects are matched in the way that makes most of it right.
    """
    things = list(asked.things)
    pairing = _match(things, reading.things)
    return Score(
        count=len(things) == len(reading.things),
        colours=_same([thing.colour for thing in things], [thing.colour for thing in reading.things]),
        shapes=_same([thing.shape for thing in things], [thing.shape for thing in reading.things]),
        bound=_same([(t.colour, t.shape) for t in things], [found.pair for found in reading.things]),
        sizes=_every([(wanted.size, found.size if found else None) for wanted, found in pairing]),
        ground=_every([(asked.ground, reading.ground)]),
        places=_places(asked, pairing),
    )


def _same(wanted: Sequence[object], found: Sequence[object]) -> bool:
    return sorted(map(str, wanted)) == sorted(map(str, found))


def _every(pairs: Sequence[tuple[str | None, str | None]]) -> bool | None:
    said = [(wanted, found) for wanted, found in pairs if wanted is not None]
    return all(wanted == found for wanted, found in said) if said else None


def _match(things: list[AskedThing], found: Sequence[Found]) -> list[tuple[AskedThing, Found | None]]:
    """Match asked objects to found ones, by colour and shape first and size next."""
    pool: list[Found | None] = [*found, *[None] * len(things)]
    best = max(
        permutations(pool[: max(len(found), len(things)) + 1], len(things)), key=lambda way: _fit(things, way)
    )
    return list(zip(things, best, strict=True))


def _fit(things: list[AskedThing], way: Sequence[Found | None]) -> int:
    total = 0
    for thing, found in zip(things, way, strict=True):
        if found is not None:
            total += 4 * (thing.colour == found.colour) + 4 * (thing.shape == found.shape)
            total += thing.size == found.size
    return total


def _places(asked: Asked, pairing: list[tuple[AskedThing, Found | None]]) -> bool | None:
    """For one object, where it stands; for two, which is the more to the left, or the higher."""
    if all(thing.place is None for thing in asked.things):
        return None
    if any(found is None for _, found in pairing):
        return False
    if len(pairing) == 1:
        return _every([(thing.place, found.place if found else None) for thing, found in pairing])
    (first, one), (_, two) = pairing
    assert one is not None
    assert two is not None
    across, down = two.centre[0] - one.centre[0], two.centre[1] - one.centre[1]
    if abs(across) >= abs(down):
        return first.place == ("left" if across > 0 else "right")
    return first.place == ("top" if down > 0 else "bottom")


def rate(values: Sequence[bool | None]) -> tuple[float, int]:
    """The share of what is right among what was asked, and how often it was asked."""
    said = [value for value in values if value is not None]
    return (sum(said) / len(said) if said else float("nan")), len(said)


ROWS = (*(field.name for field in fields(Score)), "all_but_places", "all_right")
"""The rows of the table, in order."""
